// Threads that share the threadgroups of one dispatch at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace metal_sim {

class ThreadPool {
public:
  /// Calls `body(context, first, last)` for consecutive ranges that cover 0..count-1, on the calling thread and on
  /// helpers, and returns when all have returned. Where the pool is busy with another caller's work, or the work turns
  /// out too small to share, the calling thread does it alone. `cost`: nanoseconds that one element is expected to
  /// take, 0 where unknown; returns what it took on the calling thread, or `cost` where that was not measured.
  using Body = void (*)(const void* context, uint32_t first, uint32_t last);
  uint32_t run(uint32_t count, Body body, const void* context, uint32_t cost);

  void resize(int threads);
  int size() const { return threads_.load(std::memory_order_relaxed); }

  /// The one pool of the process; never destroyed, as its threads may outlive main().
  static ThreadPool& instance();

private:
  explicit ThreadPool(int threads) : threads_(threads) {}

  void start_helpers(uint32_t count);
  void stop_helpers();
  void help(uint32_t seen);
  bool join();
  uint32_t share_work();
  void publish(uint32_t remaining);
  void finish();

  // Work of the current run. Helpers read it between join() and leaving only.
  Body body_ = nullptr;
  const void* context_ = nullptr;
  uint32_t count_ = 0;
  uint32_t step_ = 1; // elements taken at a time

  alignas(64) std::atomic<uint32_t> next_{0}; // first element that nobody has taken
  // Helpers inside the current run; OPEN while others may enter.
  static constexpr uint32_t OPEN = 1u << 31;
  alignas(64) std::atomic<uint32_t> inside_{0};
  // Incremented where there is something new to look at; sleeping helpers wait on it.
  alignas(64) std::atomic<uint32_t> news_{0};
  std::atomic<uint32_t> sleeping_{0};
  std::atomic<bool> stop_{false};

  std::mutex busy_; // held by the caller whose work this is
  std::atomic<int> threads_;
  std::vector<std::thread> helpers_;
};

} // namespace metal_sim
