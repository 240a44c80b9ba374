#include "library.h"

#include <algorithm>
#include <stdexcept>

namespace metal_moe {

Library::Library(MTL::Device* device, std::string path) : path_(std::move(path)) {
  AutoreleaseScope scope;
  NS::Error* error = nullptr;
  library_ = NS::TransferPtr(device->newLibrary(ns_string(path_.c_str()), &error));
  if (!library_)
    throw std::runtime_error("kernel library '" + path_ + "' cannot be loaded: " + describe(error));
}

NS::SharedPtr<MTL::Function> Library::function(const char* name) const {
  AutoreleaseScope scope;
  auto function = NS::TransferPtr(library_->newFunction(ns_string(name)));
  if (!function)
    throw std::runtime_error(std::string("kernel '") + name + "' is not in the library '" + path_ + "'");
  return function;
}

std::vector<std::string> Library::function_names() const {
  AutoreleaseScope scope;
  const NS::Array* array = library_->functionNames();
  std::vector<std::string> names(array->count());
  for (NS::UInteger i = 0; i < names.size(); ++i)
    names[i] = to_string(array->object<NS::String>(i));
  std::sort(names.begin(), names.end());
  return names;
}

} // namespace metal_moe
