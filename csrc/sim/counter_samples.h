// Counter sample buffers: the times at which encoders began and ended.
#pragma once

#include "objects.h"
#include "spin.h"

#include <vector>

namespace metal_sim {

class CounterSetObject final : public MTL::CounterSet {};

class SampleDescriptorObject final : public MTL::CounterSampleBufferDescriptor {
public:
  NS::SharedPtr<MTL::CounterSet> set;
  NS::UInteger count = 0;
  MTL::StorageMode storage = MTL::StorageModeShared;
  Label label;
};

class SamplesObject final : public MTL::CounterSampleBuffer {
public:
  SamplesObject(DeviceObject* device, size_t count) : device(device), clock_(device->engine.clock()), samples_(count) {}
  ~SamplesObject() override;

  /// Now, on this thread, which runs the dispatches.
  void take(size_t index) { set(index, {nanoseconds_now(), nullptr}); }
  /// When the stream of the program's comes to it.
  void take_on(size_t index, void* stream) { set(index, device->engine.time_on(stream)); }
  /// CounterErrorValue where none was taken.
  uint64_t time(size_t index) const;
  size_t count() const { return samples_.size(); }

  DeviceObject* const device;
  Label label;

private:
  void set(size_t index, Engine::Time time);

  const std::shared_ptr<void> clock_;
  std::vector<Engine::Time> samples_;
};

class AttachmentObject final : public MTL::ComputePassSampleBufferAttachmentDescriptor {
public:
  NS::SharedPtr<SamplesObject> samples;
  NS::UInteger start = 0;
  NS::UInteger end = 1;
};

class AttachmentsObject final : public MTL::ComputePassSampleBufferAttachmentDescriptorArray {
public:
  const NS::SharedPtr<AttachmentObject> first = NS::TransferPtr(new AttachmentObject);
};

class PassDescriptorObject final : public MTL::ComputePassDescriptor {
public:
  MTL::DispatchType type = MTL::DispatchTypeSerial;
  const NS::SharedPtr<AttachmentsObject> attachments = NS::TransferPtr(new AttachmentsObject);
};

} // namespace metal_sim
