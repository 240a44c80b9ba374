#include "pipeline_cache.h"

#include <stdexcept>
#include <string>

namespace metal_moe {

const Pipeline& PipelineCache::build(uint32_t index, const char* name) {
  std::lock_guard lock(mutex_);
  if (const Pipeline* pipeline = slots_[index].load(std::memory_order_relaxed))
    return *pipeline; // another thread was first
  AutoreleaseScope scope;
  const auto function = library_.function(name);
  NS::Error* error = nullptr;
  auto state = NS::TransferPtr(device_->newComputePipelineState(function.get(), &error));
  if (!state)
    throw std::runtime_error(std::string("kernel '") + name + "': no pipeline: " + describe(error));
  const auto width = static_cast<uint32_t>(state->threadExecutionWidth());
  const auto max_threads = static_cast<uint32_t>(state->maxTotalThreadsPerThreadgroup());
  built_.push_back(std::make_unique<const Pipeline>(Pipeline{name, std::move(state), width, max_threads}));
  slots_[index].store(built_.back().get(), std::memory_order_release);
  return *built_.back();
}

} // namespace metal_moe
