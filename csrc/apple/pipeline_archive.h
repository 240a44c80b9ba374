// Compiled pipelines on disk: the GPU's machine code of each kernel, under the sources' digest, the device and the
// system.
#pragma once

#include "../core/metal.h"

#include <mutex>
#include <string>

namespace metal_moe {

/// Thread-safe. A cache: where the disk fails, or what is there is of no use, pipelines are compiled as without it.
class PipelineArchive {
public:
  /// In ~/Library/Caches/metal_moe, or below XDG_CACHE_HOME where that is set. `digest`: of the kernels' sources.
  PipelineArchive(MTL::Device* device, const std::string& digest);

  /// The pipeline of `descriptor`, from disk; else compiled, added and saved. Null where that cannot be done. The same
  /// kernel with other function constants is another pipeline to Metal, here as well.
  NS::SharedPtr<MTL::ComputePipelineState> pipeline(MTL::ComputePipelineDescriptor* descriptor);

private:
  void open();
  void save();

  MTL::Device* device_;
  std::string path_; // empty: nowhere to save
  NS::SharedPtr<MTL::BinaryArchive> archive_;
  std::mutex mutex_;
};

} // namespace metal_moe
