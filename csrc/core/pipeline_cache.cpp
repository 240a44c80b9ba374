#include "pipeline_cache.h"

namespace metal_moe {

namespace {

/// Null where the kernel has none.
NS::SharedPtr<MTL::FunctionConstantValues> constant_values(const PipelineSource& source,
                                                           const FunctionConstants& constants) {
  if (!source.has_constants)
    return {};
  auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
  for (NS::UInteger index = 0; index < constants.values.size(); ++index)
    if (constants.values[index] != 0)
      values->setConstantValue(&constants.values[index], MTL::DataTypeUInt, index);
  return values;
}

} // namespace

const Pipeline& PipelineCache::build(uint32_t index, const PipelineSource& source, FunctionConstants constants) {
  std::lock_guard lock(mutex_);
  if (!(constants == FunctionConstants{}) && specialized() >= MAX_SPECIALIZED)
    constants = {};
  if (const Pipeline* pipeline = find(index, constants))
    return *pipeline; // another thread was first, or there are no more
  const bool specialized = !(constants == FunctionConstants{});
  AutoreleaseScope scope;
  const auto values = constant_values(source, constants);
  const auto descriptor = NS::TransferPtr(MTL::ComputePipelineDescriptor::alloc()->init());
  descriptor->setComputeFunction(library_.function(source.name, values.get()).get());
  descriptor->setLabel(
      ns_string(specialized && source.label ? source.label(source.name, constants).c_str() : source.name));
  descriptor->setMaxTotalThreadsPerThreadgroup(source.simdgroups * GPU_SIMD_WIDTH);
  auto state = library_.new_pipeline(descriptor.get());
  const auto width = static_cast<uint32_t>(state->threadExecutionWidth());
  const auto max_threads = static_cast<uint32_t>(state->maxTotalThreadsPerThreadgroup());
  built_.push_back(std::make_unique<const Node>(Node{{source.name, std::move(state), width, max_threads, constants},
                                                     slots_[index].load(std::memory_order_relaxed)}));
  slots_[index].store(built_.back().get(), std::memory_order_release);
  specialized_.fetch_add(specialized, std::memory_order_relaxed);
  return built_.back()->pipeline;
}

} // namespace metal_moe
