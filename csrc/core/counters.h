// What the library has done so far, in numbers: of all threads and devices. Each thread writes a block of its own, so
// counting is a load and a store that no other thread waits for, and it is always on.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace metal_moe {

enum class Counter : uint8_t {
  Operations,       // calls that reached the core: fused_moe, group_tokens, ...
  Dispatches,       // encoded
  Commits,          // of command buffers; one on a CUDA stream of the program's is a launch of what was encoded
  Synchronizations, // waits of a thread for one command buffer
  PoolHits,         // scratch from idle buffers of the pool
  PoolMisses,       // scratch that the pool allocated
  Copies,           // of arguments, before an operation
  Fallbacks         // the first of Fallback's
};

/// Something else ran than what was asked for, or than what the layer would have had with other arguments.
enum class Fallback : uint8_t {
  UnalignedRows,   // rows that are no whole vectors: kernels handle edges, element by element
  NoFp16Sums,      // use_fp32_acc=False, where only kernels with fp32 sums exist
  NoQuantizedSimd, // moe_simd on quantised weights: the kernels of base or large_batch
  CopiedInput,     // hidden_states copied to rows that are whole vectors
  ConvertedBias,   // a quantised layer's own bias converted to the dtype of hidden_states
  PassedBatch,     // inside a LayerBatch, on a stream of the program's, for which it does nothing
  TorchMatmul,     // matmul by PyTorch: beyond the measured size, or of a layout that kernels do not read
  Count
};

constexpr uint32_t COUNTERS = static_cast<uint32_t>(Counter::Fallbacks) + static_cast<uint32_t>(Fallback::Count);

using Counts = std::array<uint64_t, COUNTERS>;

namespace counting {

struct Block {
  std::array<std::atomic<uint64_t>, COUNTERS> counts{};
  std::atomic<bool> taken{true};
  Block* next = nullptr;
};

inline thread_local constinit Block* mine = nullptr;

/// The block of a thread that has none yet.
Block& take_block();

inline void add(uint32_t index, uint64_t amount) {
  std::atomic<uint64_t>& count = (mine ? *mine : take_block()).counts[index];
  count.store(count.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
}

} // namespace counting

inline void count(Counter counter, uint64_t amount = 1) { counting::add(static_cast<uint32_t>(counter), amount); }
inline void count(Fallback reason) {
  counting::add(static_cast<uint32_t>(Counter::Fallbacks) + static_cast<uint32_t>(reason), 1);
}

/// All threads' counts since the last reset_counters(). While other threads work, no moment's.
Counts read_counters();
/// Counting starts again at 0; nobody's count is lost to another's reset.
void reset_counters();

/// "dispatches", ...; "" for Fallbacks.
const char* counter_name(Counter counter);
/// "unaligned_rows", ...
const char* fallback_name(Fallback reason);

} // namespace metal_moe
