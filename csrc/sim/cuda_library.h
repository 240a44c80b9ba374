// The kernels of a metallib for the cuda engine: a folder of translated sources, cuda/*.cu, with their kernels' names
// and arguments. Nothing is compiled before a pipeline is made.
#pragma once

#include "cuda_compiler.h"
#include "kernel_library.h"

#include <memory>
#include <string>
#include <vector>

namespace metal_sim {

/// One kernel. Its entry is null; `max_total_threads_per_threadgroup` is known once it is compiled.
struct CudaKernel : Kernel {
  std::string host_name;
  std::vector<std::string> argument_names;
  std::vector<KernelArgument> argument_table;
  std::vector<bool> by_value;      // by argument: a constant that travels with the launch
  std::vector<size_t> value_bytes; // by argument, 0 where unknown; set when compiled
  const CudaSource* source = nullptr;
  void* function = nullptr; // of the device, once compiled
};

class CudaLibrary {
public:
  /// Reads `path`/cuda, or `path` where it is one .cu file. std::runtime_error where there is nothing, or something
  /// else.
  explicit CudaLibrary(const std::string& path);

  const KernelLibrary& table() const { return table_; }
  /// The kernel behind an entry of the table, to be compiled.
  CudaKernel& kernel(const Kernel& entry);
  /// Null where there is none of that name.
  const CudaKernel* find(const std::string& name) const;

private:
  void read(std::unique_ptr<CudaSource> source);

  std::vector<std::unique_ptr<CudaSource>> sources_;
  std::vector<std::unique_ptr<CudaKernel>> kernels_;
  std::vector<const Kernel*> pointers_;
  KernelLibrary table_{};
};

} // namespace metal_sim
