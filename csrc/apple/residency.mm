#include "residency.h"

#include <stdexcept>

namespace metal_moe::apple {

namespace {

bool has_residency_sets() {
  const NS::OperatingSystemVersion first{15, 0, 0};
  return NS::ProcessInfo::processInfo()->isOperatingSystemAtLeastVersion(first);
}

} // namespace

Residency::Residency(MTL::Device* device, MTL::CommandQueue* queue, const std::vector<MTL::Buffer*>& buffers)
    : queue_(NS::RetainPtr(queue)), supported_(has_residency_sets()) {
  if (!supported_)
    return;
  const AutoreleaseScope scope;
  const auto descriptor = NS::TransferPtr(MTL::ResidencySetDescriptor::alloc()->init());
  descriptor->setLabel(ns_string("metal_moe weights"));
  descriptor->setInitialCapacity(buffers.size());
  NS::Error* error = nullptr;
  set_ = NS::TransferPtr(device->newResidencySet(descriptor.get(), &error));
  if (!set_)
    throw std::runtime_error("no residency set: " + describe(error));
  // PyTorch's tensors lie in heaps; what is resident is then the heap.
  for (const MTL::Buffer* buffer : buffers) {
    if (const MTL::Heap* heap = buffer->heap())
      set_->addAllocation(heap);
    else
      set_->addAllocation(buffer);
  }
  set_->commit();
  set_->requestResidency();
  queue_->addResidencySet(set_.get());
}

void Residency::release() {
  if (!set_)
    return;
  queue_->removeResidencySet(set_.get());
  set_->endResidency();
  set_.reset();
}

} // namespace metal_moe::apple
