// Kernels that come as sources, where there was no Metal compiler at build time: compiled when first used, and what the
// compiler made of them kept on disk.
#pragma once

#include "pipeline_archive.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace metal_moe {

/// Thread-safe.
class SourceLibrary {
public:
  /// The `.metal` texts in `folder` (cmake/metal_source.py). Compiles nothing. std::runtime_error where there are none.
  SourceLibrary(MTL::Device* device, const std::string& folder);

  /// The library that the kernel's text compiles to, compiled now if it was not; null where no text has the kernel.
  /// std::runtime_error with the compiler's messages.
  MTL::Library* library_of(const std::string& kernel);

  /// A pipeline from the archive on disk, put there first if it is new. Null where the archive cannot be used.
  NS::SharedPtr<MTL::ComputePipelineState> archived_pipeline(MTL::ComputePipelineDescriptor* descriptor);

  /// Names of all kernels, sorted.
  std::vector<std::string> function_names() const;

private:
  struct Text {
    std::string path;
    NS::SharedPtr<MTL::Library> library; // null: not compiled yet
  };

  MTL::Device* device_;
  std::vector<std::unique_ptr<Text>> texts_;
  std::map<std::string, Text*> by_kernel_; // sorted
  std::mutex mutex_;                       // of the texts' libraries
  std::unique_ptr<PipelineArchive> archive_;
};

} // namespace metal_moe
