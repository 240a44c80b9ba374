#include "counters.h"

#include <mutex>

namespace metal_moe {

namespace counting {

namespace {

/// Blocks are never freed: what a thread that has ended counted stays counted, and the next thread goes on from there.
std::atomic<Block*> blocks{nullptr};

/// Gives the thread's block back when the thread ends.
struct Lease {
  ~Lease() {
    if (mine)
      mine->taken.store(false, std::memory_order_release);
    mine = nullptr;
  }
};

} // namespace

Block& take_block() {
  thread_local Lease lease;
  for (Block* block = blocks.load(std::memory_order_acquire); block; block = block->next)
    if (!block->taken.exchange(true, std::memory_order_acquire))
      return *(mine = block);
  auto* block = new Block;
  block->next = blocks.load(std::memory_order_relaxed);
  while (!blocks.compare_exchange_weak(block->next, block, std::memory_order_release, std::memory_order_relaxed)) {
  }
  return *(mine = block);
}

} // namespace counting

namespace {

std::mutex mutex; // of `start`
Counts start{};   // totals at the last reset

Counts totals() {
  Counts sum{};
  for (const auto* block = counting::blocks.load(std::memory_order_acquire); block; block = block->next)
    for (uint32_t i = 0; i < COUNTERS; ++i)
      sum[i] += block->counts[i].load(std::memory_order_relaxed);
  return sum;
}

} // namespace

Counts read_counters() {
  const std::lock_guard lock(mutex);
  Counts counts = totals();
  for (uint32_t i = 0; i < COUNTERS; ++i)
    counts[i] -= start[i];
  return counts;
}

void reset_counters() {
  const std::lock_guard lock(mutex);
  start = totals();
}

const char* counter_name(Counter counter) {
  switch (counter) {
  case Counter::Operations:
    return "operations";
  case Counter::Dispatches:
    return "dispatches";
  case Counter::Commits:
    return "commits";
  case Counter::Synchronizations:
    return "synchronizations";
  case Counter::PoolHits:
    return "pool_hits";
  case Counter::PoolMisses:
    return "pool_misses";
  case Counter::Copies:
    return "copies";
  case Counter::Fallbacks:
    break;
  }
  return "";
}

const char* fallback_name(Fallback reason) {
  switch (reason) {
  case Fallback::UnalignedRows:
    return "unaligned_rows";
  case Fallback::NoFp16Sums:
    return "no_fp16_sums";
  case Fallback::NoQuantizedSimd:
    return "no_quantized_simd";
  case Fallback::CopiedInput:
    return "copied_input";
  case Fallback::ConvertedBias:
    return "converted_bias";
  case Fallback::PassedBatch:
    return "passed_batch";
  case Fallback::TorchMatmul:
    return "torch_matmul";
  case Fallback::Count:
    break;
  }
  return "";
}

} // namespace metal_moe
