#include "thread_pool.h"
#include "metal_sim/control.h"
#include "spin.h"

#include <algorithm>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <linux/futex.h>
#include <new>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <system_error>
#include <unistd.h>

namespace metal_sim {
namespace {

// A helper looks for more work this long before it sleeps: the dispatches of one layer follow each other within it, and
// so do the layers of a model where little happens between.
constexpr uint64_t HELPER_SPIN = 50'000;
// Work that takes no longer than this is not worth the wake-up of a sleeping helper, which takes about as long.
constexpr uint64_t WORTH_WAKING = 10'000;
// Sharing with helpers that spin costs a few cache misses, and a long wait where one has just lost its processor.
constexpr uint64_t WORTH_SHARING = 4'000;
// Less than this says nothing about the cost of the rest: a look at the clock takes a tenth of it.
constexpr uint64_t MEASURABLE = 300;
// Pieces per thread: few enough that taking one is cheap, many enough that threads finish together.
constexpr uint32_t PIECES_PER_THREAD = 32;

void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word, int threads) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
}

int processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    return std::max(1, CPU_COUNT(&set));
  return std::max(1, int(std::thread::hardware_concurrency()));
}

int initial_threads() {
  const char* text = std::getenv("METAL_MOE_NUM_THREADS");
  const int wanted = text ? std::atoi(text) : 0;
  return wanted > 0 ? wanted : processors();
}

/// Less is believed at once, more only by half: a thread that loses its processor measures too much.
uint32_t updated(uint32_t cost, uint64_t measured) {
  measured = std::min<uint64_t>(measured, UINT32_MAX);
  return uint32_t(measured < cost ? measured : (cost + measured + 1) / 2);
}

} // namespace

ThreadPool& ThreadPool::instance() {
  static auto* pool = [] {
    auto* made = new ThreadPool(initial_threads());
    // The child of a fork has none of the threads: it begins with none, and nobody inside.
    static ThreadPool* forked = made;
    pthread_atfork(nullptr, nullptr, [] { new (forked) ThreadPool(forked->size()); });
    return made;
  }();
  return *pool;
}

void ThreadPool::resize(int threads) {
  const std::lock_guard lock(busy_);
  threads_.store(std::max(1, threads), std::memory_order_relaxed);
  stop_helpers(); // the next run starts as many as it needs
}

void ThreadPool::start_helpers(uint32_t count) {
  // Signals belong to the threads of the program.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const uint32_t seen = news_.load();
  try {
    while (helpers_.size() < count) {
      helpers_.emplace_back(&ThreadPool::help, this, seen);
      pthread_setname_np(helpers_.back().native_handle(), "metal-native");
    }
  } catch (const std::system_error&) { // no more threads to be had: go on with those there are
    threads_.store(int(helpers_.size()) + 1, std::memory_order_relaxed);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadPool::stop_helpers() {
  stop_.store(true);
  news_.fetch_add(1);
  futex_wake(news_, INT_MAX);
  for (std::thread& helper : helpers_)
    helper.join();
  helpers_.clear();
  stop_.store(false);
}

bool ThreadPool::join() {
  uint32_t inside = inside_.load(std::memory_order_relaxed);
  while (inside & OPEN) {
    if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire, std::memory_order_relaxed))
      return true;
  }
  return false;
}

void ThreadPool::help(uint32_t seen) {
  for (;;) {
    const auto changed = [&] { return news_.load(std::memory_order_acquire) != seen; };
    if (!spin_until(HELPER_SPIN, changed)) {
      sleeping_.fetch_add(1);
      while (!changed())
        futex_wait(news_, seen);
      sleeping_.fetch_sub(1);
    }
    seen = news_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed))
      return;
    if (join()) {
      share_work();
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }
}

/// Returns how many elements the calling thread did.
uint32_t ThreadPool::share_work() {
  uint32_t done = 0;
  for (;;) {
    const uint32_t first = next_.fetch_add(step_, std::memory_order_relaxed);
    if (first >= count_)
      return done;
    const uint32_t last = std::min(count_, first + step_);
    body_(context_, first, last);
    done += last - first;
  }
}

void ThreadPool::publish(uint32_t remaining) {
  inside_.store(OPEN, std::memory_order_release);
  news_.fetch_add(1);
  if (sleeping_.load() > 0)
    futex_wake(news_, int(std::min<uint32_t>(remaining, INT_MAX)));
}

void ThreadPool::finish() {
  // After closing, only those inside are waited for: at most the last piece of each.
  inside_.fetch_and(~OPEN, std::memory_order_acq_rel);
  const auto alone = [&] { return inside_.load(std::memory_order_acquire) == 0; };
  while (!spin_until(HELPER_SPIN, alone))
    sched_yield(); // a helper has lost its processor, perhaps to this thread
}

uint32_t ThreadPool::run(uint32_t count, Body body, const void* context, uint32_t cost) {
  const auto threads = uint32_t(size());
  std::unique_lock lock(busy_, std::defer_lock);
  if (count < 2 || threads < 2 || !lock.try_lock()) {
    body(context, 0, count);
    return cost;
  }
  body_ = body;
  context_ = context;
  count_ = count;
  // Bounded so that first + step does not overflow: every thread adds to next_ once beyond the end.
  step_ = std::clamp(count / (threads * PIECES_PER_THREAD), 1u, 1u << 16);
  if (helpers_.size() + 1 < threads)
    start_helpers(threads - 1);

  // Work of unknown or small cost begins alone; share when what remains is worth it, judged by what is done.
  uint32_t done = 0;
  uint64_t start = nanoseconds_now(), remaining = uint64_t(cost) * count;
  while (remaining <= (sleeping_.load(std::memory_order_relaxed) ? WORTH_WAKING : WORTH_SHARING)) {
    const uint32_t last = std::min(count, 2 * done + step_); // twice as many each time: few looks at the clock
    body(context, done, last);
    done = last;
    const uint64_t elapsed = nanoseconds_now() - start;
    if (done == count)
      return updated(cost, elapsed / done);
    if (elapsed > MEASURABLE)
      remaining = elapsed / done * (count - done);
  }
  next_.store(done, std::memory_order_relaxed);
  publish(count - done);
  start = nanoseconds_now(); // without the wake-up
  done = share_work();
  if (done)
    cost = updated(cost, (nanoseconds_now() - start) / done);
  finish();
  return cost;
}

void set_num_threads(int threads) { ThreadPool::instance().resize(threads); }
int num_threads() { return ThreadPool::instance().size(); }

} // namespace metal_sim
