#include "fork.h"

#include <atomic>
#include <pthread.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace metal_moe {

namespace {

std::atomic<uint32_t> generation{0};

/// Never freed: forks happen while static objects are destroyed.
struct Guarded {
  std::mutex mutex; // of the list
  std::vector<std::mutex*> mutexes;
};

Guarded& guarded();

void lock_all() {
  guarded().mutex.lock();
  for (std::mutex* mutex : guarded().mutexes)
    mutex->lock();
}

void unlock_all() {
  for (std::mutex* mutex : guarded().mutexes)
    mutex->unlock();
  guarded().mutex.unlock();
}

void unlock_all_in_child() {
  generation.fetch_add(1, std::memory_order_relaxed);
  unlock_all();
}

Guarded& guarded() {
  static auto* made = [] {
    pthread_atfork(lock_all, unlock_all, unlock_all_in_child);
    return new Guarded;
  }();
  return *made;
}

} // namespace

uint32_t fork_generation() { return generation.load(std::memory_order_relaxed); }

void check_not_forked(const char* operation, uint32_t made) {
  if (made != fork_generation())
    throw std::runtime_error(
        std::string(operation) +
        ": this process was forked from the one that made the stream or device; command buffers "
        "and their threads stay with the parent. Make them in the child, or start it by \"spawn\"");
}

ForkGuard::ForkGuard(std::mutex& mutex) : mutex_(mutex) {
  const std::lock_guard lock(guarded().mutex);
  guarded().mutexes.push_back(&mutex_);
}

ForkGuard::~ForkGuard() {
  const std::lock_guard lock(guarded().mutex);
  std::erase(guarded().mutexes, &mutex_);
}

} // namespace metal_moe
