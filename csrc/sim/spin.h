// Waiting for another thread without giving up the processor, for a bounded time.
#pragma once

#include <chrono>
#include <cstdint>

namespace metal_sim {

inline uint64_t nanoseconds_now() {
  return uint64_t(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb"); // `yield` is free on most cores, `isb` waits as long as x86's pause
#endif
}

/// True as soon as `condition()` is, false after about `nanoseconds`.
template <class Condition>
bool spin_until(uint64_t nanoseconds, Condition condition) {
  constexpr int checks_per_clock_read = 16;
  const uint64_t start = nanoseconds_now();
  do {
    for (int i = 0; i < checks_per_clock_read; ++i) {
      if (condition())
        return true;
      cpu_relax();
    }
  } while (nanoseconds_now() - start < nanoseconds);
  return condition();
}

} // namespace metal_sim
