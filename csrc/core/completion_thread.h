// The thread on which a stream tells the program that work has completed.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

namespace metal_moe {

/// Runs tasks one after another, in the order in which they were posted. Not Metal's thread: a slow task delays no
/// command buffer. Not the poster's either: a task may take locks that the poster holds.
class CompletionThread {
public:
  /// Must live until it has run.
  struct Task {
    virtual ~Task() = default;
    virtual void run() noexcept = 0;
    Task* next = nullptr;
  };

  CompletionThread();
  /// Runs what was posted, then ends. Not on the thread itself.
  ~CompletionThread();
  CompletionThread(const CompletionThread&) = delete;
  CompletionThread& operator=(const CompletionThread&) = delete;

  /// Allocates nothing.
  void post(Task& task) noexcept;

private:
  void work();

  std::mutex mutex_;
  std::condition_variable posted_;
  Task* first_ = nullptr;
  Task* last_ = nullptr;
  bool stop_ = false;
  std::thread thread_;
};

} // namespace metal_moe
