// The engine for production on CPUs: a simdgroup is one lane and a threadgroup one thread, so a threadgroup is one
// plain call of the kernel, and threadgroups spread over the cores.
#include "engine.h"
#include "objects.h"
#include "thread_pool.h"

namespace metal_sim {
namespace {

void run_threadgroups(const void* context, uint32_t first, uint32_t last) {
  // Memory of the threadgroup that this thread runs, on its stack: a library loaded late has little room for
  // thread-local data. Cache-line aligned, as is every argument in it.
  constexpr uint32_t alignment = 64;
  alignas(alignment) std::byte memory[MAX_THREADGROUP_MEMORY + MAX_THREADGROUP_ARGUMENTS * alignment];

  const Dispatch& dispatch = *static_cast<const Dispatch*>(context);
  const Kernel& kernel = *dispatch.kernel;
  KernelArguments arguments;
  arguments.constants = dispatch.arguments.constants;
  uint32_t used = 0;
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const KernelArgument& argument = kernel.arguments[i];
    if (argument.kind == ArgumentKind::Buffer) {
      arguments.buffers[argument.index] = dispatch.arguments.buffers[argument.index];
    } else {
      arguments.threadgroup[argument.index] = memory + used;
      used += (dispatch.threadgroup_bytes[argument.index] + alignment - 1) / alignment * alignment;
    }
  }
  ThreadContext thread = {};
  thread.threadgroups_per_grid = dispatch.grid;
  thread.threads_per_threadgroup = dispatch.group;
  thread.simdgroups_per_threadgroup = 1;
  for (uint32_t i = first; i < last; ++i) {
    thread.threadgroup_position_in_grid = position(i, dispatch.grid);
    kernel.entry(arguments, thread);
  }
}

class NativeEngine final : public Engine {
public:
  uint32_t max_threads_per_threadgroup() const override { return 1; }
  const char* name() const override { return "native"; }
  bool tells_time() const override { return true; }

  std::string run(const Dispatch& dispatch, uint32_t) override {
    const uint32_t cost = dispatch.cost->load(std::memory_order_relaxed);
    const uint32_t measured =
        ThreadPool::instance().run(uint32_t(volume(dispatch.grid)), run_threadgroups, &dispatch, cost);
    dispatch.cost->store(measured, std::memory_order_relaxed);
    return "";
  }
};

} // namespace

Engine& native_engine() {
  static NativeEngine engine;
  return engine;
}

} // namespace metal_sim
