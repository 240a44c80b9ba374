// What a compiled kernel library of the stand-in exports, and what an engine gives to the kernels it runs.
//
// One library (.so) holds every kernel for one engine and one processor level; it is what a metallib is to Metal.
// Translated kernels (csrc/sim/msl) are compiled against this header on one side, the engines on the other.
#pragma once

#ifndef METAL_SIM_CUDA // compiled by NVRTC: msl/cuda_integers.h
#include <cstddef>
#include <cstdint>
#endif

namespace metal_sim {

constexpr uint32_t KERNEL_LIBRARY_ABI = 3;
constexpr uint32_t MAX_BUFFERS = 31; // Metal's limit of buffer indices
constexpr uint32_t MAX_THREADGROUP_ARGUMENTS = 31;

struct Size3 {
  uint32_t x, y, z;
};

/// Everything a kernel can ask through an attribute ([[thread_position_in_grid]], ...).
struct ThreadContext {
  Size3 threadgroups_per_grid;
  Size3 threads_per_threadgroup;
  Size3 threadgroup_position_in_grid;
  Size3 thread_position_in_threadgroup;
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
};

/// What a pipeline sets a function constant to: the bits of its type, the others 0.
struct ConstantValue {
  uint32_t bits;
  uint32_t defined;
};

/// Bound memory by index: `buffers[i]` already includes the offset it was bound with.
struct KernelArguments {
  void* buffers[MAX_BUFFERS];
  void* threadgroup[MAX_THREADGROUP_ARGUMENTS];
  const ConstantValue* constants; // in order of the kernel's list; null where that is empty
};

enum class ArgumentKind : uint32_t { Buffer, Threadgroup };

struct KernelArgument {
  ArgumentKind kind;
  uint32_t index;
  uint32_t alignment; // of the pointed-to type: a buffer bound at a smaller alignment is an API error
  bool writable;
  const char* name;
};

/// A [[function_constant(index)]] of the kernel's source.
struct KernelConstant {
  uint32_t index;
  uint32_t type;     // number of its MTL::DataType
  uint32_t required; // read where is_function_constant_defined() does not guard it
  const char* name;
};

struct Kernel {
  const char* name;
  void (*entry)(const KernelArguments&, const ThreadContext&); // runs one thread
  const KernelArgument* arguments;
  uint32_t argument_count;
  uint32_t max_total_threads_per_threadgroup; // from the attribute, else 1024
  const KernelConstant* constants;
  uint32_t constant_count;
};

/// Which memory a barrier orders: the bits of MSL's mem_flags.
enum MemoryFlags : uint32_t { MEMORY_NONE = 0, MEMORY_DEVICE = 1, MEMORY_THREADGROUP = 2 };

enum class Access : uint32_t { Read, Write, Atomic };

/// Services of the `exact` engine, installed before the first launch. `native` kernels need none: null.
struct ExactServices {
  /// Blocks until every thread of the threadgroup has arrived. A thread that has returned or waits elsewhere while
  /// others wait here is an error (Metal leaves it undefined). `memory`: MemoryFlags; accesses to memory that the
  /// flags leave out stay unordered.
  void (*threadgroup_barrier)(uint32_t memory);
  /// The same for the threads of the simdgroup.
  void (*simdgroup_barrier)(uint32_t memory);
  /// Publishes `bytes` (<= 1024) of this thread, blocks until every live thread of the simdgroup has published, and
  /// returns a table of SIMD_WIDTH pointers to what each published (null for threads that have returned). The table
  /// stays valid until this thread's second next exchange. `operation` names the function, for the error message where
  /// threads of one simdgroup meet in different ones. Orders no memory.
  const void* const* (*exchange)(const char* operation, const void* value, size_t bytes);
  /// This thread's lane.
  uint32_t (*lane)();
  /// A kernel is about to read or write `bytes` at `address` (called by the compiler's memory instrumentation). Does
  /// not return where that is an error.
  void (*access)(const void* address, size_t bytes, Access access);
  /// This thread works ahead of the end of the dispatch in front, or has waited for it: see
  /// kernels/tiles/early_start.h. Ahead of it a thread may neither write memory of the device nor read what that
  /// dispatch may have written.
  void (*work_ahead)(bool ahead);
};

struct KernelLibrary {
  uint32_t abi;
  const char* engine; // "exact", "native"
  const char* level;  // "x86-64-v3", "arm64", ...
  uint32_t simd_width;
  const Kernel* const* kernels;
  uint32_t kernel_count;
  const ExactServices** services; // where the exact engine stores its services; null in `native`
};

} // namespace metal_sim

/// The one exported symbol.
extern "C" const metal_sim::KernelLibrary* metal_sim_kernel_library();
