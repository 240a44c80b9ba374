#include "kernel_times.h"

#if defined(__APPLE__)
#include <objc/message.h>
#endif

#include <algorithm>
#include <cstring>

namespace metal_moe {

namespace {

const MTL::CounterSet* timestamp_set(MTL::Device* device) {
  const NS::Array* sets = device->counterSets();
  for (NS::UInteger i = 0; sets && i < sets->count(); ++i) {
    const auto* set = sets->object<MTL::CounterSet>(i);
    if (to_string(set->name()) == "timestamp") // MTLCommonCounterSetTimestamp
      return set;
  }
  return nullptr;
}

/// metal-cpp has `mutableBytes` alone, which NSData does not answer to.
const void* bytes_of(const NS::Data* data) {
#if defined(__APPLE__)
  using Bytes = const void* (*)(const void*, SEL);
  return reinterpret_cast<Bytes>(&objc_msgSend)(data, sel_registerName("bytes"));
#else
  return data->mutableBytes();
#endif
}

} // namespace

bool KernelTimes::supported(MTL::Device* device) {
  const AutoreleaseScope scope;
  return device->supportsCounterSampling(MTL::CounterSamplingPointAtStageBoundary) && timestamp_set(device);
}

bool KernelTimes::add_samples() {
  const auto descriptor = NS::TransferPtr(MTL::CounterSampleBufferDescriptor::alloc()->init());
  descriptor->setCounterSet(timestamp_set(device_));
  descriptor->setSampleCount(2 * PAIRS);
  descriptor->setStorageMode(MTL::StorageModeShared);
  NS::Error* error = nullptr;
  auto samples = NS::TransferPtr(device_->newCounterSampleBuffer(descriptor.get(), &error));
  if (!samples)
    return false;
  if (samples_.empty())
    device_->sampleTimestamps(&host_, &device_time_);
  samples_.push_back(std::move(samples));
  return true;
}

MTL::ComputeCommandEncoder* KernelTimes::encoder(MTL::CommandBuffer* commands) {
  open_timed_ = pairs_ < samples_.size() * PAIRS || add_samples();
  if (!open_timed_)
    return commands->computeCommandEncoder();
  const uint32_t first = 2 * (pairs_ % PAIRS);
  auto* pass = MTL::ComputePassDescriptor::computePassDescriptor();
  auto* attachment = pass->sampleBufferAttachments()->object(0);
  attachment->setSampleBuffer(samples_[pairs_ / PAIRS].get());
  attachment->setStartOfEncoderSampleIndex(first);
  attachment->setEndOfEncoderSampleIndex(first + 1);
  pairs_ += 1;
  return commands->computeCommandEncoder(pass);
}

void KernelTimes::set_alone(double start_seconds, double end_seconds) {
  if (records_.empty() || end_seconds <= start_seconds)
    return;
  records_.back().record.device_start = static_cast<uint64_t>(start_seconds * 1e9);
  records_.back().record.device_end = static_cast<uint64_t>(end_seconds * 1e9);
}

void KernelTimes::resolve() {
  if (samples_.empty())
    return;
  const AutoreleaseScope scope;
  MTL::Timestamp host_now = 0, device_now = 0;
  device_->sampleTimestamps(&host_now, &device_now);
  // A device may count in units of its own: two moments on both clocks give its rate.
  const double rate = device_now > device_time_ && host_now > host_
                          ? static_cast<double>(host_now - host_) / static_cast<double>(device_now - device_time_)
                          : 1.0;
  const auto on_host = [&](uint64_t time) {
    return host_ + static_cast<int64_t>(static_cast<double>(static_cast<int64_t>(time - device_time_)) * rate);
  };
  for (uint32_t block = 0; block < samples_.size(); ++block) {
    const uint32_t used = std::min(pairs_ - block * PAIRS, PAIRS);
    const NS::Data* data = samples_[block]->resolveCounterRange(NS::Range(0, 2 * used));
    if (!data || data->length() < 2 * used * sizeof(MTL::CounterResultTimestamp))
      continue;
    std::vector<MTL::CounterResultTimestamp> times(2 * used);
    std::memcpy(times.data(), bytes_of(data), times.size() * sizeof times[0]);
    for (Entry& entry : records_) {
      if (!entry.timed || (entry.pairs - 1) / PAIRS != block)
        continue;
      const uint32_t first = 2 * ((entry.pairs - 1) % PAIRS);
      const uint64_t start = times[first].timestamp, end = times[first + 1].timestamp;
      if (start == MTL::CounterErrorValue || end == MTL::CounterErrorValue || start == 0 || end < start)
        continue;
      entry.record.device_start = on_host(start);
      entry.record.device_end = on_host(end);
    }
  }
}

std::vector<DispatchRecord> KernelTimes::records() const {
  std::vector<DispatchRecord> records;
  for (const Entry& entry : records_)
    records.push_back(entry.record);
  return records;
}

} // namespace metal_moe
