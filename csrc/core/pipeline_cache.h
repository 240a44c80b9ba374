// Compute pipelines of one device, built at first use and found by a small number afterwards.
#pragma once

#include "library.h"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

namespace metal_moe {

/// What a kernel's function constants are set to, all of them uint: that of index i to values[i], 0 leaving it
/// undefined.
struct FunctionConstants {
  std::array<uint32_t, 2> values{};

  bool operator==(const FunctionConstants&) const = default;
};

/// A kernel ready to run.
struct Pipeline {
  const char* name; // static storage
  NS::SharedPtr<MTL::ComputePipelineState> state;
  uint32_t simd_width;  // threads of a simdgroup
  uint32_t max_threads; // of a threadgroup
  FunctionConstants constants;
};

/// What a pipeline is built from.
struct PipelineSource {
  const char* name;           // of the kernel; static storage
  uint32_t simdgroups;        // of its largest threadgroup: with few the compiler may give each thread more registers
  bool has_constants = false; // function constants
  /// The pipeline's label, where constants are set; what a GPU capture shows.
  std::string (*label)(const char* name, const FunctionConstants& constants) = nullptr;
};

/// Thread-safe. A hit takes one atomic load, and one more for each pipeline of the kernel with other constants: no
/// lock, no string.
class PipelineCache {
public:
  /// Kernels that a cache can hold.
  static constexpr uint32_t CAPACITY = 512;
  /// Pipelines with constants set: some tens of kilobytes of machine code each, and none is given back.
  static constexpr uint32_t MAX_SPECIALIZED = 2048;

  explicit PipelineCache(const Library& library) : library_(library) {}

  /// The pipeline of a kernel whose number in the caller's kernel table is `index` (< CAPACITY), with `constants`;
  /// without any where there are MAX_SPECIALIZED pipelines with others. `source` must always be the same for an index.
  /// std::runtime_error naming the kernel where it cannot be built; a later call tries again.
  const Pipeline& get(uint32_t index, const PipelineSource& source, const FunctionConstants& constants = {}) {
    const Pipeline* pipeline = find(index, constants);
    return pipeline ? *pipeline : build(index, source, constants);
  }

  /// The pipeline that get() has built for these, else null.
  const Pipeline* find(uint32_t index, const FunctionConstants& constants = {}) const {
    for (const Node* node = slots_[index].load(std::memory_order_acquire); node; node = node->next)
      if (node->pipeline.constants == constants)
        return &node->pipeline;
    return nullptr;
  }

  /// Pipelines with constants set.
  uint32_t specialized() const { return specialized_.load(std::memory_order_relaxed); }

private:
  /// Threads of a simdgroup on every GPU; an engine with fewer needs less than the limit made from it.
  static constexpr uint32_t GPU_SIMD_WIDTH = 32;

  struct Node {
    Pipeline pipeline;
    const Node* next; // of the same kernel
  };

  const Pipeline& build(uint32_t index, const PipelineSource& source, FunctionConstants constants);

  const Library& library_;
  std::array<std::atomic<const Node*>, CAPACITY> slots_{};
  std::atomic<uint32_t> specialized_{0};
  std::mutex mutex_;
  std::vector<std::unique_ptr<const Node>> built_;
};

} // namespace metal_moe
