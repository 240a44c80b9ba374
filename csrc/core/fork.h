// What a fork leaves to the child: all memory, and no thread but the one that forked.
#pragma once

#include <cstdint>
#include <mutex>

namespace metal_moe {

/// Forks between this process and the one that the program was started as: an object that remembers the number it was
/// made with knows whether its threads and its queue are still there. One atomic load.
uint32_t fork_generation();

/// std::runtime_error naming `operation` where there was a fork since `generation`: what was made then is the parent's.
void check_not_forked(const char* operation, uint32_t generation);

/// While it lives, a fork waits for `mutex`, so that the child never finds it locked by a thread that it does not have.
/// For mutexes with which no other is taken.
class ForkGuard {
public:
  explicit ForkGuard(std::mutex& mutex);
  ~ForkGuard();
  ForkGuard(const ForkGuard&) = delete;
  ForkGuard& operator=(const ForkGuard&) = delete;

private:
  std::mutex& mutex_;
};

} // namespace metal_moe
