#include "pipeline_cache.h"

namespace metal_moe {

const Pipeline& PipelineCache::build(uint32_t index, const char* name, uint32_t simdgroups) {
  std::lock_guard lock(mutex_);
  if (const Pipeline* pipeline = slots_[index].load(std::memory_order_relaxed))
    return *pipeline; // another thread was first
  AutoreleaseScope scope;
  const auto descriptor = NS::TransferPtr(MTL::ComputePipelineDescriptor::alloc()->init());
  descriptor->setComputeFunction(library_.function(name).get());
  descriptor->setLabel(ns_string(name)); // what a GPU capture shows
  descriptor->setMaxTotalThreadsPerThreadgroup(simdgroups * GPU_SIMD_WIDTH);
  auto state = library_.new_pipeline(descriptor.get());
  const auto width = static_cast<uint32_t>(state->threadExecutionWidth());
  const auto max_threads = static_cast<uint32_t>(state->maxTotalThreadsPerThreadgroup());
  built_.push_back(std::make_unique<const Pipeline>(Pipeline{name, std::move(state), width, max_threads}));
  slots_[index].store(built_.back().get(), std::memory_order_release);
  return *built_.back();
}

} // namespace metal_moe
