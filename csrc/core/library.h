// A compiled kernel library (metallib), the names of its functions, and pipelines made of them.
#pragma once

#include "metal.h"

#include <memory>
#include <string>
#include <vector>

namespace metal_moe {

class SourceLibrary;

class Library {
public:
  /// Loads the metallib at `path`. On Apple's Metal a folder holds sources instead (see apple/source_library.h).
  /// std::runtime_error with the path and Metal's reason where it cannot be loaded.
  Library(MTL::Device* device, std::string path);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  /// The function `name`, with `constants` where it has function constants (else null). std::runtime_error naming it
  /// and the library where it does not exist, or with Metal's reason where those constants do not fit.
  NS::SharedPtr<MTL::Function> function(const char* name, const MTL::FunctionConstantValues* constants = nullptr) const;

  /// A pipeline of a function of this library. std::runtime_error naming the kernel where Metal makes none.
  NS::SharedPtr<MTL::ComputePipelineState> new_pipeline(MTL::ComputePipelineDescriptor* descriptor) const;

  /// Names of all functions, sorted.
  std::vector<std::string> function_names() const;

  const std::string& path() const { return path_; }

private:
  MTL::Device* device_;
  std::string path_;
  NS::SharedPtr<MTL::Library> library_;    // null where there are sources
  std::unique_ptr<SourceLibrary> sources_; // Apple only
};

} // namespace metal_moe
