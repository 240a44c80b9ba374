// A compiled kernel library (metallib) and the names of its functions.
#pragma once

#include "metal.h"

#include <string>
#include <vector>

namespace metal_moe {

class Library {
public:
  /// Loads the metallib at `path`. std::runtime_error with the path and Metal's reason where it cannot be loaded.
  Library(MTL::Device* device, std::string path);

  /// The function `name`. std::runtime_error naming it and the library where it does not exist.
  NS::SharedPtr<MTL::Function> function(const char* name) const;

  /// Names of all functions, sorted.
  std::vector<std::string> function_names() const;

  const std::string& path() const { return path_; }

private:
  std::string path_;
  NS::SharedPtr<MTL::Library> library_;
};

} // namespace metal_moe
