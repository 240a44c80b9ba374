#include "library.h"

#if defined(__APPLE__)
#include "../apple/source_library.h"

#include <filesystem>
#endif

#include <algorithm>
#include <stdexcept>

namespace metal_moe {

#if !defined(__APPLE__)
/// The stand-in compiles nothing at run time.
class SourceLibrary {};
#endif

Library::Library(MTL::Device* device, std::string path) : device_(device), path_(std::move(path)) {
#if defined(__APPLE__)
  if (std::filesystem::is_directory(path_)) {
    sources_ = std::make_unique<SourceLibrary>(device, path_);
    return;
  }
#endif
  AutoreleaseScope scope;
  NS::Error* error = nullptr;
  library_ = NS::TransferPtr(device->newLibrary(ns_string(path_.c_str()), &error));
  if (!library_)
    throw std::runtime_error("kernel library '" + path_ + "' cannot be loaded: " + describe(error));
}

Library::~Library() = default;

NS::SharedPtr<MTL::Function> Library::function(const char* name, const MTL::FunctionConstantValues* constants) const {
  AutoreleaseScope scope;
  NS::Error* error = nullptr;
#if defined(__APPLE__)
  const MTL::Library* library = sources_ ? sources_->library_of(name) : library_.get();
#else
  const MTL::Library* library = library_.get();
#endif
  auto function = NS::SharedPtr<MTL::Function>();
  if (library) {
    auto* source = const_cast<MTL::Library*>(library);
    function = NS::TransferPtr(constants ? source->newFunction(ns_string(name), constants, &error)
                                         : source->newFunction(ns_string(name)));
  }
  if (!function)
    throw std::runtime_error(std::string("kernel '") + name + "' is not in the library '" + path_ + "'" +
                             (error ? ": " + describe(error) : ""));
  return function;
}

NS::SharedPtr<MTL::ComputePipelineState> Library::new_pipeline(MTL::ComputePipelineDescriptor* descriptor) const {
  AutoreleaseScope scope;
  NS::Error* error = nullptr;
  NS::SharedPtr<MTL::ComputePipelineState> state;
#if defined(__APPLE__)
  if (sources_)
    state = sources_->archived_pipeline(descriptor);
#endif
  if (!state)
    state = NS::TransferPtr(device_->newComputePipelineState(descriptor, MTL::PipelineOptionNone, nullptr, &error));
  if (!state)
    throw std::runtime_error("kernel '" + to_string(descriptor->label()) + "': no pipeline: " + describe(error));
  return state;
}

std::vector<std::string> Library::function_names() const {
#if defined(__APPLE__)
  if (sources_)
    return sources_->function_names();
#endif
  AutoreleaseScope scope;
  const NS::Array* array = library_->functionNames();
  std::vector<std::string> names(array->count());
  for (NS::UInteger i = 0; i < names.size(); ++i)
    names[i] = to_string(array->object<NS::String>(i));
  std::sort(names.begin(), names.end());
  return names;
}

} // namespace metal_moe
