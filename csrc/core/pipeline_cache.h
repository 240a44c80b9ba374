// Compute pipelines of one device, built at first use and found by a small number afterwards.
#pragma once

#include "library.h"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

namespace metal_moe {

/// A kernel ready to run.
struct Pipeline {
  const char* name; // static storage
  NS::SharedPtr<MTL::ComputePipelineState> state;
  uint32_t simd_width;  // threads of a simdgroup
  uint32_t max_threads; // of a threadgroup
};

/// Thread-safe. A hit is one atomic load: no lock, no string.
class PipelineCache {
public:
  /// Kernels that a cache can hold.
  static constexpr uint32_t CAPACITY = 512;

  explicit PipelineCache(const Library& library) : library_(library) {}

  /// The pipeline of kernel `name`, whose number in the caller's kernel table is `index` (< CAPACITY), for threadgroups
  /// of at most `simdgroups` simdgroups: the compiler may then give each thread more registers. `name` must have static
  /// storage and, like `simdgroups`, always be the same for an index. std::runtime_error naming the kernel where it
  /// cannot be built; a later call tries again.
  const Pipeline& get(uint32_t index, const char* name, uint32_t simdgroups) {
    const Pipeline* pipeline = slots_[index].load(std::memory_order_acquire);
    return pipeline ? *pipeline : build(index, name, simdgroups);
  }

private:
  /// Threads of a simdgroup on every GPU; an engine with fewer needs less than the limit made from it.
  static constexpr uint32_t GPU_SIMD_WIDTH = 32;

  const Pipeline& build(uint32_t index, const char* name, uint32_t simdgroups);

  const Library& library_;
  std::array<std::atomic<const Pipeline*>, CAPACITY> slots_{};
  std::mutex mutex_;
  std::vector<std::unique_ptr<const Pipeline>> built_;
};

} // namespace metal_moe
