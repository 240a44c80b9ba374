// Libraries, functions and pipelines: finding the compiled kernels of an engine and processor.
#include "exact_services.h"
#include "objects.h"
#include "processor.h"

#include <algorithm>
#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <fstream>
#include <link.h>
#include <mutex>
#include <stdexcept>

namespace metal_sim {
namespace {

namespace fs = std::filesystem;

constexpr char LIBRARY_ERROR_DOMAIN[] = "MTLLibraryErrorDomain";

struct LoadError {
  MTL::LibraryError code;
  std::string text;
};

std::string libraries_in(const fs::path& directory) {
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory, ignored)) {
    if (entry.path().extension() == ".so")
      names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  std::string text;
  for (const std::string& name : names)
    text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "nothing" : text;
}

fs::path choose_native(const fs::path& directory) {
  const auto file = [&](const std::string& level) { return directory / ("native-" + level + ".so"); };
  const auto& levels = processor_levels();
  if (const std::string level = forced_level(); !level.empty()) {
    const auto known = std::find_if(levels.begin(), levels.end(), [&](const auto& l) { return l.name == level; });
    if (known == levels.end() || !fs::exists(file(level)))
      throw LoadError{MTL::LibraryErrorFileNotFound, "METAL_MOE_CPU_LEVEL is '" + level +
                                                         "', but there is no kernel library of that level: " +
                                                         directory.string() + " holds " + libraries_in(directory)};
    if (!known->supported)
      throw LoadError{MTL::LibraryErrorUnsupported,
                      "METAL_MOE_CPU_LEVEL is '" + level + "', which this processor does not run"};
    return file(level);
  }
  for (const ProcessorLevel& level : levels) {
    if (level.supported && fs::exists(file(level.name)))
      return file(level.name);
  }
  throw LoadError{MTL::LibraryErrorFileNotFound,
                  "no kernel library for this processor: " + directory.string() + " holds " + libraries_in(directory)};
}

fs::path choose(const std::string& engine, const fs::path& path) {
  if (!fs::is_directory(path))
    return path;
  if (engine == "native")
    return choose_native(path);
  const fs::path file = path / (engine + ".so");
  if (!fs::exists(file))
    throw LoadError{MTL::LibraryErrorFileNotFound,
                    "no " + engine + ".so: " + path.string() + " holds " + libraries_in(path)};
  return file;
}

/// What is wrong with a kernel's table, or "".
std::string defect(const Kernel& kernel) {
  if (!kernel.name || !kernel.entry)
    return "a kernel without name or entry";
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const KernelArgument& argument = kernel.arguments[i];
    const uint32_t limit = argument.kind == ArgumentKind::Buffer ? MAX_BUFFERS : MAX_THREADGROUP_ARGUMENTS;
    if (argument.index >= limit)
      return std::string("kernel '") + kernel.name + "': index " + std::to_string(argument.index) + " of argument '" +
             argument.name + "' is not below " + std::to_string(limit);
    if (argument.kind == ArgumentKind::Buffer && argument.alignment == 0)
      return std::string("kernel '") + kernel.name + "': argument '" + argument.name + "' has no alignment";
  }
  return "";
}

/// Whether a shared library is shorter than its own header says: loading it would end the process by SIGBUS.
bool is_cut(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  ElfW(Ehdr) header;
  if (!stream.read(reinterpret_cast<char*>(&header), sizeof header) ||
      std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0)
    return false; // the loader says what it is
  std::error_code error;
  const uintmax_t bytes = fs::file_size(file, error);
  return !error && bytes < header.e_shoff + uintmax_t(header.e_shnum) * header.e_shentsize;
}

const KernelLibrary* open(const DeviceObject& device, const fs::path& file) {
  if (is_cut(file))
    throw LoadError{MTL::LibraryErrorUnsupported, file.string() + ": the file ends too early"};
  // Never closed: pipelines, error messages and encoded dispatches point into it.
  void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle)
    throw LoadError{fs::exists(file) ? MTL::LibraryErrorUnsupported : MTL::LibraryErrorFileNotFound, dlerror()};
  using Query = const KernelLibrary* (*)();
  const auto query = reinterpret_cast<Query>(dlsym(handle, "metal_sim_kernel_library"));
  if (!query)
    throw LoadError{MTL::LibraryErrorUnsupported, file.string() + ": not a kernel library"};
  const KernelLibrary* library = query();
  const auto refuse = [&](const std::string& reason) {
    throw LoadError{MTL::LibraryErrorUnsupported, file.string() + ": " + reason};
  };
  if (library->abi != KERNEL_LIBRARY_ABI)
    refuse("interface version " + std::to_string(library->abi) + ", not " + std::to_string(KERNEL_LIBRARY_ABI));
  if (std::string_view(library->engine) != device.engine.name())
    refuse(std::string("compiled for engine '") + library->engine + "', not '" + device.engine.name() + "'");
  if (library->simd_width == 0 || library->simd_width > MAX_THREADS_PER_THREADGROUP)
    refuse("simdgroups of " + std::to_string(library->simd_width) + " threads");
  for (uint32_t i = 0; i < library->kernel_count; ++i) {
    if (const std::string text = defect(*library->kernels[i]); !text.empty())
      refuse(text);
  }
  if (library->services) {
    static std::mutex mutex; // the same library may be loaded on several threads
    const std::lock_guard lock(mutex);
    *library->services = &exact_services();
  }
  return library;
}

const LibraryObject* impl(const MTL::Library* library) { return static_cast<const LibraryObject*>(library); }
const FunctionObject* impl(const MTL::Function* function) { return static_cast<const FunctionObject*>(function); }
const PipelineObject* impl(const MTL::ComputePipelineState* state) { return static_cast<const PipelineObject*>(state); }
DescriptorObject* impl(MTL::ComputePipelineDescriptor* descriptor) {
  return static_cast<DescriptorObject*>(descriptor);
}
const DescriptorObject* impl(const MTL::ComputePipelineDescriptor* descriptor) {
  return static_cast<const DescriptorObject*>(descriptor);
}

/// `descriptor` may be null: no limit of its own, and no label.
MTL::ComputePipelineState* new_pipeline(MTL::Device* device, const MTL::Function* computeFunction,
                                        const DescriptorObject* descriptor, NS::Error** error) {
  if (!computeFunction) {
    set_error(error, LIBRARY_ERROR_DOMAIN, MTL::LibraryErrorFunctionNotFound,
              "newComputePipelineState: function is null");
    return nullptr;
  }
  const FunctionObject* function = impl(computeFunction);
  if (function->library->device != device) {
    set_error(error, LIBRARY_ERROR_DOMAIN, MTL::LibraryErrorUnsupported,
              std::string("newComputePipelineState: function '") + function->kernel->name +
                  "' belongs to another device");
    return nullptr;
  }
  if (function->constants.size() != function->kernel->constant_count) {
    set_error(error, LIBRARY_ERROR_DOMAIN, MTL::LibraryErrorUnsupported,
              std::string("newComputePipelineState: function '") + function->kernel->name +
                  "' has function constants: make it by newFunction with constant values");
    return nullptr;
  }
  try {
    if (const std::string failure = function->library->device->engine.prepare(*function->kernel); !failure.empty())
      throw std::runtime_error(failure);
  } catch (const std::runtime_error& failure) {
    set_error(error, LIBRARY_ERROR_DOMAIN, MTL::LibraryErrorCompileFailure, failure.what());
    return nullptr;
  }
  // What no GPU has; an engine with fewer threads allows fewer.
  if (descriptor && descriptor->max_threads > MAX_THREADS_PER_THREADGROUP) {
    set_error(error, LIBRARY_ERROR_DOMAIN, MTL::LibraryErrorUnsupported,
              std::string("newComputePipelineState: function '") + function->kernel->name +
                  "': maxTotalThreadsPerThreadgroup is " + std::to_string(descriptor->max_threads) +
                  ", the most there is " + std::to_string(MAX_THREADS_PER_THREADGROUP));
    return nullptr;
  }
  auto* pipeline = new PipelineObject(*function, descriptor ? descriptor->max_threads : 0);
  if (descriptor && descriptor->label.get())
    pipeline->label.set(descriptor->label.get());
  return pipeline;
}

/// Bytes of a function constant of a type; 0: not one of those that kernels may have here.
size_t constant_bytes(MTL::DataType type) {
  switch (type) {
  case MTL::DataTypeBool:
  case MTL::DataTypeChar:
  case MTL::DataTypeUChar:
    return 1;
  case MTL::DataTypeShort:
  case MTL::DataTypeUShort:
    return 2;
  case MTL::DataTypeInt:
  case MTL::DataTypeUInt:
  case MTL::DataTypeFloat:
    return 4;
  default:
    return 0;
  }
}

/// The values that a kernel takes of `given`. std::runtime_error where one is missing or of another type.
Constants constants_of(const Kernel& kernel, const ConstantValuesObject& given) {
  Constants constants;
  for (uint32_t i = 0; i < kernel.constant_count; ++i) {
    const KernelConstant& constant = kernel.constants[i];
    const auto describe = [&] {
      return std::string("function '") + kernel.name + "': function constant '" + constant.name + "' (index " +
             std::to_string(constant.index) + ")";
    };
    const auto found = given.values.find(constant.index);
    if (found == given.values.end() && constant.required)
      throw std::runtime_error(describe() + " has no value");
    if (found != given.values.end() && found->second.type != constant.type)
      throw std::runtime_error(describe() + " has type " + std::to_string(constant.type) +
                               " (MTLDataType), the value given has type " + std::to_string(found->second.type));
    constants.push_back(found == given.values.end() ? ConstantValue{0, 0} : ConstantValue{found->second.bits, 1});
  }
  return constants;
}

} // namespace

LibraryObject::LibraryObject(DeviceObject* device, const KernelLibrary* kernels) : device(device), kernels(kernels) {
  by_name.reserve(kernels->kernel_count);
  for (uint32_t i = 0; i < kernels->kernel_count; ++i)
    by_name.emplace(kernels->kernels[i]->name, kernels->kernels[i]);
}

LibraryObject* load_library(DeviceObject* device, const std::string& path, NS::Error** error) {
  try {
    const KernelLibrary* own = device->engine.open_library(path);
    return new LibraryObject(device, own ? own : open(*device, choose(device->engine.name(), path)));
  } catch (const LoadError& failure) {
    set_error(error, LIBRARY_ERROR_DOMAIN, NS::Integer(failure.code), failure.text);
  } catch (const std::runtime_error& failure) {
    set_error(error, LIBRARY_ERROR_DOMAIN, NS::Integer(MTL::LibraryErrorFileNotFound), failure.what());
  }
  return nullptr;
}

} // namespace metal_sim

namespace MTL {

using namespace metal_sim;

Device* Library::device() const { return impl(this)->device; }
NS::String* Library::label() const { return impl(this)->label.get(); }
void Library::setLabel(const NS::String* label) { static_cast<LibraryObject*>(this)->label.set(label); }

NS::Array* Library::functionNames() const {
  std::vector<NS::SharedPtr<StringObject>> names;
  std::vector<const NS::Object*> pointers;
  for (uint32_t i = 0; i < impl(this)->kernels->kernel_count; ++i) {
    names.push_back(NS::TransferPtr(new StringObject(impl(this)->kernels->kernels[i]->name)));
    pointers.push_back(names.back().get());
  }
  return NS::Array::array(pointers.data(), pointers.size());
}

Function* Library::newFunction(const NS::String* functionName) {
  auto* library = static_cast<LibraryObject*>(this);
  const auto found = library->by_name.find(text_of(functionName));
  return found == library->by_name.end() ? nullptr : new FunctionObject(NS::RetainPtr(library), found->second, {});
}

Function* Library::newFunction(const NS::String* name, const FunctionConstantValues* constantValues,
                               NS::Error** error) {
  auto* library = static_cast<LibraryObject*>(this);
  const auto found = library->by_name.find(text_of(name));
  if (found == library->by_name.end()) {
    set_error(error, LIBRARY_ERROR_DOMAIN, LibraryErrorFunctionNotFound,
              "function '" + std::string(text_of(name)) + "' is not in the library");
    return nullptr;
  }
  const Kernel& kernel = *found->second;
  try {
    Constants constants = constants_of(kernel, static_cast<const ConstantValuesObject&>(*constantValues));
    const Kernel* specialized =
        constants.empty() ? &kernel : library->device->engine.specialize(kernel, constants.data());
    return new FunctionObject(NS::RetainPtr(library), specialized, std::move(constants));
  } catch (const std::runtime_error& failure) {
    set_error(error, LIBRARY_ERROR_DOMAIN, LibraryErrorCompileFailure, failure.what());
    return nullptr;
  }
}

FunctionConstantValues* FunctionConstantValues::alloc() { return new ConstantValuesObject; }
FunctionConstantValues* FunctionConstantValues::init() { return this; }
void FunctionConstantValues::reset() { static_cast<ConstantValuesObject*>(this)->values.clear(); }
void FunctionConstantValues::setConstantValue(const void* value, DataType type, NS::UInteger index) {
  const size_t bytes = constant_bytes(type);
  if (!value || bytes == 0)
    throw std::logic_error("FunctionConstantValues::setConstantValue: " +
                           (value ? "type " + std::to_string(type) + " at index " + std::to_string(index) +
                                        " is no scalar that the stand-in knows"
                                  : "the value for index " + std::to_string(index) + " is null"));
  uint32_t bits = 0;
  std::memcpy(&bits, value, bytes);
  static_cast<ConstantValuesObject*>(this)->values[index] = {type, bits};
}

Device* Function::device() const { return impl(this)->library->device; }
NS::String* Function::name() const { return metal_sim::string(impl(this)->kernel->name); }
NS::String* Function::label() const { return impl(this)->label.get(); }
void Function::setLabel(const NS::String* label) { static_cast<FunctionObject*>(this)->label.set(label); }

ComputePipelineDescriptor* ComputePipelineDescriptor::alloc() { return new DescriptorObject; }
ComputePipelineDescriptor* ComputePipelineDescriptor::init() { return this; }
Function* ComputePipelineDescriptor::computeFunction() const { return impl(this)->function.get(); }
void ComputePipelineDescriptor::setComputeFunction(const Function* computeFunction) {
  impl(this)->function = NS::RetainPtr(const_cast<Function*>(computeFunction));
}
NS::String* ComputePipelineDescriptor::label() const { return impl(this)->label.get(); }
void ComputePipelineDescriptor::setLabel(const NS::String* label) { impl(this)->label.set(label); }
NS::UInteger ComputePipelineDescriptor::maxTotalThreadsPerThreadgroup() const { return impl(this)->max_threads; }
void ComputePipelineDescriptor::setMaxTotalThreadsPerThreadgroup(NS::UInteger maxTotalThreadsPerThreadgroup) {
  impl(this)->max_threads = maxTotalThreadsPerThreadgroup;
}

ComputePipelineState* Device::newComputePipelineState(const Function* computeFunction, NS::Error** error) {
  return new_pipeline(this, computeFunction, nullptr, error);
}

ComputePipelineState* Device::newComputePipelineState(const ComputePipelineDescriptor* descriptor, PipelineOption,
                                                      const AutoreleasedComputePipelineReflection*, NS::Error** error) {
  return new_pipeline(this, descriptor->computeFunction(), impl(descriptor), error);
}

Device* ComputePipelineState::device() const { return impl(this)->library->device; }
NS::String* ComputePipelineState::label() const { return impl(this)->label.get(); }
NS::UInteger ComputePipelineState::threadExecutionWidth() const { return impl(this)->simd_width; }
NS::UInteger ComputePipelineState::staticThreadgroupMemoryLength() const { return 0; }

NS::UInteger ComputePipelineState::maxTotalThreadsPerThreadgroup() const {
  const PipelineObject* pipeline = impl(this);
  const uint32_t threads = std::min(pipeline->kernel->max_total_threads_per_threadgroup,
                                    pipeline->library->device->engine.max_threads_per_threadgroup());
  return pipeline->max_threads ? std::min<NS::UInteger>(threads, pipeline->max_threads) : threads;
}

} // namespace MTL
