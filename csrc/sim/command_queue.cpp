#include "command_queue.h"
#include "spin.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <pthread.h>
#include <sys/timerfd.h>
#include <system_error>
#include <unistd.h>

namespace metal_sim {
namespace {

// How long a committed buffer is left to whoever may wait for it. Committing and waiting at once takes a microsecond,
// encoding the next buffer a few; nobody notices 50 us where nobody waits.
constexpr uint64_t SHORTEST_DELAY = 50'000;
// A worker that keeps waking for nothing (every commit is waited for) backs off to one wake-up per millisecond.
constexpr uint64_t LONGEST_DELAY = 1'000'000;
constexpr uint64_t NOW = 1;

// Recordings that a queue keeps: more than are usually in flight.
constexpr size_t MAX_IDLE_RECORDINGS = 8;

// A waiter spins this long before it sleeps: about what it costs to be woken.
constexpr uint64_t WAIT_SPIN = 20'000;

} // namespace

Schedule::Schedule() : delay_(SHORTEST_DELAY) {}

Schedule::~Schedule() {
  if (timer_ >= 0)
    close(timer_);
}

void Schedule::enqueue(CommandBufferObject* buffer) {
  const std::lock_guard lock(mutex_);
  buffer->add_reference();
  pending_.push_back(buffer);
  buffer->status.store(MTL::CommandBufferStatusEnqueued, std::memory_order_release);
}

void Schedule::commit(CommandBufferObject* buffer) {
  const std::lock_guard lock(mutex_);
  if (buffer->status.load(std::memory_order_relaxed) == MTL::CommandBufferStatusNotEnqueued) {
    buffer->add_reference();
    pending_.push_back(buffer);
  }
  buffer->status.store(MTL::CommandBufferStatusCommitted, std::memory_order_release);
  if (sleepers_)
    changed_.notify_all(); // one may have waited for this buffer to stop blocking those behind it
  if (runner_ != std::thread::id())
    return; // looks at the queue again when it is done
  // Two buffers without a wait between them: their owner means to go on, so start at once.
  arm(pending_.size() > 1 ? NOW : delay_);
}

bool Schedule::front_is_ready() const {
  return !pending_.empty() &&
         pending_.front()->status.load(std::memory_order_relaxed) == MTL::CommandBufferStatusCommitted;
}

void Schedule::wait(CommandBufferObject* buffer) {
  if (buffer->finished.load(std::memory_order_acquire))
    return;
  std::unique_lock lock(mutex_);
  while (!buffer->finished.load(std::memory_order_acquire)) {
    if (runner_ == std::this_thread::get_id())
      misuse("CommandBuffer::waitUntilCompleted", "called from a completion handler of the same queue: it would wait "
                                                  "for itself");
    if (runner_ == std::thread::id() && front_is_ready()) {
      run_front(lock);
      continue;
    }
    lock.unlock();
    spin_until(WAIT_SPIN, [&] { return buffer->finished.load(std::memory_order_acquire); });
    lock.lock();
    const bool idle = runner_ == std::thread::id() && front_is_ready();
    if (!idle && !buffer->finished.load(std::memory_order_acquire)) {
      ++sleepers_;
      changed_.wait(lock);
      --sleepers_;
    }
  }
  // Leave the rest to its own waiter, or to the worker.
  if (runner_ == std::thread::id() && front_is_ready())
    arm(NOW);
}

void Schedule::run_front(std::unique_lock<std::mutex>& lock) {
  runner_ = std::this_thread::get_id();
  CommandBufferObject* buffer = pending_.front();
  lock.unlock();
  buffer->execute();
  lock.lock();
  pending_.pop_front();
  buffer->finished.store(true, std::memory_order_release);
  runner_ = std::thread::id();
  if (sleepers_)
    changed_.notify_all();
  // The last reference to the buffer may be the last to the queue; neither needs the lock, and this object is held by
  // whoever called.
  lock.unlock();
  buffer->drop_reference();
  lock.lock();
}

void Schedule::arm(uint64_t nanoseconds) {
  if (armed_ && (soon_ || nanoseconds != NOW))
    return;
  if (timer_ < 0) {
    timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    if (timer_ < 0)
      throw std::system_error(errno, std::generic_category(), "timerfd_create");
    // Signals belong to the threads of the program.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    worker_ = std::thread([self = shared_from_this()] { self->work(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(worker_.native_handle(), "metal-queue");
  }
  itimerspec when = {};
  when.it_value.tv_nsec = long(nanoseconds);
  timerfd_settime(timer_, 0, &when, nullptr);
  armed_ = true;
  soon_ = nanoseconds == NOW;
}

void Schedule::work() {
  for (;;) {
    uint64_t expirations;
    if (read(timer_, &expirations, sizeof expirations) < 0 && errno == EINTR)
      continue;
    std::unique_lock lock(mutex_);
    if (stop_)
      return;
    const bool useful = runner_ == std::thread::id() && front_is_ready();
    if (!soon_)
      delay_ = useful ? SHORTEST_DELAY : std::min(2 * delay_, LONGEST_DELAY);
    armed_ = soon_ = false;
    while (runner_ == std::thread::id() && front_is_ready() && !stop_)
      run_front(lock);
  }
}

void Schedule::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    if (timer_ >= 0) {
      soon_ = false;
      arm(NOW);
    }
  }
  if (!worker_.joinable())
    return;
  if (worker_.get_id() == std::this_thread::get_id())
    worker_.detach(); // released the queue itself; returns when it is back in work()
  else
    worker_.join();
}

QueueObject::QueueObject(DeviceObject* device) : device(device), schedule(std::make_shared<Schedule>()) {}

QueueObject::~QueueObject() { schedule->stop(); }

std::unique_ptr<Recording> QueueObject::take_recording() {
  {
    const std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      auto recording = std::move(idle_.back());
      idle_.pop_back();
      return recording;
    }
  }
  return std::make_unique<Recording>();
}

void QueueObject::give_back(std::unique_ptr<Recording> recording) {
  recording->clear();
  const std::lock_guard lock(mutex_);
  if (idle_.size() < MAX_IDLE_RECORDINGS)
    idle_.push_back(std::move(recording));
}

} // namespace metal_sim

namespace MTL {

using namespace metal_sim;

namespace {

QueueObject* impl(CommandQueue* queue) { return static_cast<QueueObject*>(queue); }
const QueueObject* impl(const CommandQueue* queue) { return static_cast<const QueueObject*>(queue); }

CommandBuffer* new_command_buffer(CommandQueue* queue, bool retains) {
  return (new CommandBufferObject(NS::RetainPtr(impl(queue)), retains))->autorelease();
}

} // namespace

Device* CommandQueue::device() const { return impl(this)->device; }
NS::String* CommandQueue::label() const { return impl(this)->label.get(); }
void CommandQueue::setLabel(const NS::String* label) { impl(this)->label.set(label); }
CommandBuffer* CommandQueue::commandBuffer() { return new_command_buffer(this, true); }
CommandBuffer* CommandQueue::commandBufferWithUnretainedReferences() { return new_command_buffer(this, false); }

} // namespace MTL
