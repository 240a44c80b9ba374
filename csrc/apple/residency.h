// Keeps large weights in the GPU's memory between uses, where the system can be asked to (macOS 15 and later).
#pragma once

#include "../core/metal.h"

#include <vector>

namespace metal_moe::apple {

/// Memory that stays resident for as long as this object lives. Without it, weights that no command buffer has used for
/// a second or so may be unmapped, and the next layer pays for mapping them again.
class Residency {
public:
  /// Of the buffers, for work on `queue`. On older systems nothing happens: supported() says so.
  /// std::runtime_error where Metal refuses.
  Residency(MTL::Device* device, MTL::CommandQueue* queue, const std::vector<MTL::Buffer*>& buffers);
  ~Residency() { release(); }
  Residency(const Residency&) = delete;
  Residency& operator=(const Residency&) = delete;

  void release();

  bool supported() const { return supported_; }
  /// Bytes kept; 0 once released.
  uint64_t bytes() const { return set_ ? set_->allocatedSize() : 0; }

private:
  NS::SharedPtr<MTL::CommandQueue> queue_;
  NS::SharedPtr<MTL::ResidencySet> set_;
  bool supported_;
};

} // namespace metal_moe::apple
