// The objects behind Metal.hpp that live long: devices, buffers, libraries, functions and pipelines.
#pragma once

#include "Metal/Metal.hpp"
#include "engine.h"
#include "foundation.h"
#include "kernel_library.h"

#include <atomic>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace metal_sim {

constexpr uint32_t MAX_THREADS_PER_THREADGROUP = 1024;
constexpr uint32_t MAX_THREADGROUPS = 1u << 31;  // of a grid: linear positions and a counter beyond them fit 32 bits
constexpr uint32_t THREADGROUP_MEMORY_UNIT = 16; // Metal takes lengths in multiples of it
constexpr uint32_t MAX_SET_BYTES = 4 << 10;

/// One per engine, immortal.
class DeviceObject final : public MTL::Device {
public:
  DeviceObject(std::string name, Engine& engine, bool checked)
      : name(std::move(name)), engine(engine), checked(checked) {}

  const std::string name;
  Engine& engine;
  const bool checked; // fresh buffers are filled with 0xFF bytes and stand apart
  std::atomic<size_t> allocated{0};

private:
  std::string describe() const override { return name; }
};

DeviceObject* native_device();
DeviceObject* exact_device();

class BufferObject final : public MTL::Buffer {
public:
  using Deallocator = std::function<void(void*, NS::UInteger)>;

  /// Takes over `contents`; `deallocator` may be empty. `allocated`: bytes to count as the device's.
  BufferObject(DeviceObject* device, void* contents, size_t length, MTL::ResourceOptions options,
               Deallocator deallocator, size_t allocated);
  ~BufferObject() override;

  DeviceObject* const device;
  void* const contents;
  const size_t length;
  const MTL::ResourceOptions options;
  const Deallocator deallocator;
  const size_t allocated;
  Label label;
};

class LibraryObject final : public MTL::Library {
public:
  LibraryObject(DeviceObject* device, const KernelLibrary* kernels);

  DeviceObject* const device;
  const KernelLibrary* const kernels;
  std::unordered_map<std::string_view, const Kernel*> by_name;
  Label label;
};

/// Loads `path`: one kernel library, or a directory of them of which it picks the best that this processor runs. Null
/// and an error where that fails.
LibraryObject* load_library(DeviceObject* device, const std::string& path, NS::Error** error);

/// Values of function constants, by index.
class ConstantValuesObject final : public MTL::FunctionConstantValues {
public:
  struct Value {
    MTL::DataType type;
    uint32_t bits;
  };
  std::map<NS::UInteger, Value> values;
};

/// Values in order of a kernel's list. Without any, of a kernel that has constants: made without values.
using Constants = std::vector<ConstantValue>;

class FunctionObject final : public MTL::Function {
public:
  FunctionObject(NS::SharedPtr<LibraryObject> library, const Kernel* kernel, Constants constants)
      : library(library), kernel(kernel), constants(std::move(constants)) {}

  const NS::SharedPtr<LibraryObject> library;
  const Kernel* const kernel;
  const Constants constants;
  Label label;
};

class DescriptorObject final : public MTL::ComputePipelineDescriptor {
public:
  NS::SharedPtr<MTL::Function> function;
  NS::UInteger max_threads = 0;
  Label label;
};

class PipelineObject final : public MTL::ComputePipelineState {
public:
  /// `max_threads`: the descriptor's limit per threadgroup; 0: none of its own.
  PipelineObject(const FunctionObject& function, NS::UInteger max_threads)
      : library(function.library), kernel(function.kernel), constants(function.constants),
        simd_width(library->kernels->simd_width), max_threads(max_threads) {}

  const NS::SharedPtr<LibraryObject> library;
  const Kernel* const kernel;
  const Constants constants;
  const uint32_t simd_width;
  const NS::UInteger max_threads;
  mutable std::atomic<uint32_t> cost{0}; // see Dispatch
  Label label;
};

} // namespace metal_sim
