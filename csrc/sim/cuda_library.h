// The kernels of a metallib for the cuda engine: a folder of translated sources, cuda/*.cu, with their kernels' names
// and arguments. Nothing is compiled before a pipeline is made.
#pragma once

#include "cuda_compiler.h"
#include "kernel_library.h"

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace metal_sim {

/// One kernel, for one set of values of its function constants. Its entry is null;
/// `max_total_threads_per_threadgroup` is known once it is compiled.
struct CudaKernel : Kernel {
  std::string host_name;
  std::vector<std::string> definitions; // options of the compiler for the constants that have values
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
  /// The kernel behind an entry of the table, or one that specialize() gave, to be compiled; null where it is not of
  /// this library.
  CudaKernel* kernel(const Kernel& entry);
  /// A kernel of the table with values of its function constants: the same one for the same values. Kept for ever.
  const CudaKernel* specialize(const CudaKernel& kernel, const ConstantValue* values);
  /// Null where there is none of that name.
  const CudaKernel* find(const std::string& name) const;

private:
  struct Source {
    CudaSource text;
    std::vector<KernelConstant> constants;
    std::vector<std::unique_ptr<const std::string>> constant_names;
  };

  void read(std::unique_ptr<Source> source);

  std::vector<std::unique_ptr<Source>> sources_;
  std::vector<std::unique_ptr<CudaKernel>> kernels_;
  std::map<std::pair<const Kernel*, std::vector<std::string>>, std::unique_ptr<CudaKernel>> specialized_;
  std::vector<const Kernel*> pointers_;
  KernelLibrary table_{};
};

} // namespace metal_sim
