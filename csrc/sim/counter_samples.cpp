#include "counter_samples.h"

#include <cstring>

namespace metal_sim {

SamplesObject::~SamplesObject() {
  for (const Engine::Time& sample : samples_)
    device->engine.release_time(sample);
}

void SamplesObject::set(size_t index, Engine::Time time) {
  device->engine.release_time(samples_[index]);
  samples_[index] = time;
}

uint64_t SamplesObject::time(size_t index) const {
  return device->engine.nanoseconds_of(samples_[index], clock_.get());
}

} // namespace metal_sim

namespace MTL {

using namespace metal_sim;

namespace {

template <class Object, class Face>
Object* as(Face* face) {
  return static_cast<Object*>(face);
}
template <class Object, class Face>
const Object* as(const Face* face) {
  return static_cast<const Object*>(face);
}

CounterSetObject* timestamps() {
  static auto* set = new CounterSetObject; // immortal
  return set;
}

Engine& engine_of(const Device* device) { return as<DeviceObject>(device)->engine; }

constexpr NS::UInteger MAX_SAMPLES = (32 << 10) / sizeof(CounterResultTimestamp); // of a buffer, on Apple's GPUs

} // namespace

NS::String* CounterSet::name() const { return metal_sim::string("timestamp"); }

CounterSampleBufferDescriptor* CounterSampleBufferDescriptor::alloc() { return new SampleDescriptorObject; }
CounterSampleBufferDescriptor* CounterSampleBufferDescriptor::init() { return this; }
CounterSet* CounterSampleBufferDescriptor::counterSet() const { return as<SampleDescriptorObject>(this)->set.get(); }
void CounterSampleBufferDescriptor::setCounterSet(const CounterSet* counterSet) {
  as<SampleDescriptorObject>(this)->set = NS::RetainPtr(const_cast<CounterSet*>(counterSet));
}
NS::String* CounterSampleBufferDescriptor::label() const { return as<SampleDescriptorObject>(this)->label.get(); }
void CounterSampleBufferDescriptor::setLabel(const NS::String* label) {
  as<SampleDescriptorObject>(this)->label.set(label);
}
NS::UInteger CounterSampleBufferDescriptor::sampleCount() const { return as<SampleDescriptorObject>(this)->count; }
void CounterSampleBufferDescriptor::setSampleCount(NS::UInteger sampleCount) {
  as<SampleDescriptorObject>(this)->count = sampleCount;
}
StorageMode CounterSampleBufferDescriptor::storageMode() const { return as<SampleDescriptorObject>(this)->storage; }
void CounterSampleBufferDescriptor::setStorageMode(StorageMode storageMode) {
  as<SampleDescriptorObject>(this)->storage = storageMode;
}

Device* CounterSampleBuffer::device() const { return as<SamplesObject>(this)->device; }
NS::String* CounterSampleBuffer::label() const { return as<SamplesObject>(this)->label.get(); }
NS::UInteger CounterSampleBuffer::sampleCount() const { return as<SamplesObject>(this)->count(); }

NS::Data* CounterSampleBuffer::resolveCounterRange(NS::Range range) {
  const auto* samples = as<SamplesObject>(this);
  if (range.location > samples->count() || range.length > samples->count() - range.location)
    misuse("CounterSampleBuffer::resolveCounterRange", "samples " + std::to_string(range.location) + " to " +
                                                           std::to_string(range.Max()) + " of " +
                                                           std::to_string(samples->count()));
  std::vector<std::byte> bytes(range.length * sizeof(CounterResultTimestamp));
  for (size_t i = 0; i < range.length; ++i) {
    const CounterResultTimestamp result{samples->time(range.location + i)};
    std::memcpy(bytes.data() + i * sizeof result, &result, sizeof result);
  }
  return (new DataObject(std::move(bytes)))->autorelease();
}

ComputePassSampleBufferAttachmentDescriptor* ComputePassSampleBufferAttachmentDescriptor::alloc() {
  return new AttachmentObject;
}
ComputePassSampleBufferAttachmentDescriptor* ComputePassSampleBufferAttachmentDescriptor::init() { return this; }
CounterSampleBuffer* ComputePassSampleBufferAttachmentDescriptor::sampleBuffer() const {
  return as<AttachmentObject>(this)->samples.get();
}
void ComputePassSampleBufferAttachmentDescriptor::setSampleBuffer(const CounterSampleBuffer* sampleBuffer) {
  as<AttachmentObject>(this)->samples = NS::RetainPtr(const_cast<SamplesObject*>(as<SamplesObject>(sampleBuffer)));
}
NS::UInteger ComputePassSampleBufferAttachmentDescriptor::startOfEncoderSampleIndex() const {
  return as<AttachmentObject>(this)->start;
}
void ComputePassSampleBufferAttachmentDescriptor::setStartOfEncoderSampleIndex(NS::UInteger index) {
  as<AttachmentObject>(this)->start = index;
}
NS::UInteger ComputePassSampleBufferAttachmentDescriptor::endOfEncoderSampleIndex() const {
  return as<AttachmentObject>(this)->end;
}
void ComputePassSampleBufferAttachmentDescriptor::setEndOfEncoderSampleIndex(NS::UInteger index) {
  as<AttachmentObject>(this)->end = index;
}

ComputePassSampleBufferAttachmentDescriptor*
ComputePassSampleBufferAttachmentDescriptorArray::object(NS::UInteger attachmentIndex) {
  if (attachmentIndex != 0)
    misuse("ComputePassSampleBufferAttachmentDescriptorArray::object",
           "index " + std::to_string(attachmentIndex) + ": the stand-in has one attachment");
  return as<AttachmentsObject>(this)->first.get();
}

ComputePassDescriptor* ComputePassDescriptor::computePassDescriptor() { return alloc()->autorelease(); }
ComputePassDescriptor* ComputePassDescriptor::alloc() { return new PassDescriptorObject; }
ComputePassDescriptor* ComputePassDescriptor::init() { return this; }
DispatchType ComputePassDescriptor::dispatchType() const { return as<PassDescriptorObject>(this)->type; }
void ComputePassDescriptor::setDispatchType(DispatchType dispatchType) {
  as<PassDescriptorObject>(this)->type = dispatchType;
}
ComputePassSampleBufferAttachmentDescriptorArray* ComputePassDescriptor::sampleBufferAttachments() const {
  return as<PassDescriptorObject>(this)->attachments.get();
}

bool Device::supportsCounterSampling(CounterSamplingPoint samplingPoint) {
  return samplingPoint == CounterSamplingPointAtStageBoundary && engine_of(this).tells_time();
}

NS::Array* Device::counterSets() const {
  return engine_of(this).tells_time() ? NS::Array::array(timestamps()) : NS::Array::array();
}

CounterSampleBuffer* Device::newCounterSampleBuffer(const CounterSampleBufferDescriptor* descriptor,
                                                    NS::Error** error) {
  const auto* wanted = as<SampleDescriptorObject>(descriptor);
  const auto refuse = [&](const std::string& why) -> CounterSampleBuffer* {
    set_error(error, "MTLCounterErrorDomain", CounterSampleBufferErrorInvalid, why);
    return nullptr;
  };
  if (!engine_of(this).tells_time() || wanted->set.get() != timestamps())
    return refuse("the counter set is none of the device's");
  if (wanted->count == 0 || wanted->count > MAX_SAMPLES)
    return refuse(std::to_string(wanted->count) + " samples: must be 1 to " + std::to_string(MAX_SAMPLES));
  auto* samples = new SamplesObject(as<DeviceObject>(this), wanted->count);
  samples->label.set(wanted->label.get());
  return samples;
}

void Device::sampleTimestamps(Timestamp* cpuTimestamp, Timestamp* gpuTimestamp) {
  *cpuTimestamp = *gpuTimestamp = nanoseconds_now();
}

} // namespace MTL
