#include "completion_thread.h"

#include <csignal>
#include <utility>

namespace metal_moe {

CompletionThread::CompletionThread() {
  // Signals belong to the threads of the program.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { work(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

CompletionThread::~CompletionThread() {
  if (!thread_.joinable())
    return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  posted_.notify_one();
  thread_.join();
}

void CompletionThread::post(Task& task) noexcept {
  const std::lock_guard lock(mutex_);
  task.next = nullptr;
  (last_ ? last_->next : first_) = &task;
  last_ = &task;
  posted_.notify_one(); // with the lock held: this object may end as soon as the task has run
}

void CompletionThread::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    posted_.wait(lock, [&] { return first_ || stop_; });
    if (!first_)
      return;
    Task* task = std::exchange(first_, first_->next);
    if (!first_)
      last_ = nullptr;
    lock.unlock();
    task->run();
    lock.lock();
  }
}

} // namespace metal_moe
