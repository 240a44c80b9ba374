// Encodes dispatches into command buffers, decides when to commit, and brings back what went wrong.
//
// A stream is used by one thread at a time. Its dispatches run in the order in which they were encoded, each after all
// before it.
#pragma once

#include "buffer_pool.h"
#include "completion_thread.h"
#include "fork.h"
#include "kernel_times.h"
#include "pipeline_cache.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace metal_moe {

/// A place in a buffer, as a kernel argument.
struct BufferView {
  MTL::Buffer* buffer = nullptr;
  size_t offset = 0; // bytes

  explicit operator bool() const { return buffer != nullptr; }
};

/// A command buffer failed. The message names its kernels and repeats what the device said.
class ExecutionError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A command buffer has run.
struct Completion {
  double gpu_start, gpu_end; // seconds on the clock of the machine (std::chrono::steady_clock)
  const std::string& error;  // empty where it succeeded
};

class CommandStream {
public:
  /// When an owned stream commits on its own, asked at the end of every operation (an operation is never split).
  struct Policy {
    /// Enough to hide the cost of a commit (tens of microseconds on a GPU) behind work; few enough that the device
    /// starts early.
    uint32_t max_dispatches = 64;
    /// Bytes that the dispatches read and write: one millisecond of a fast GPU's bandwidth or so.
    size_t max_bytes = size_t(256) << 20;
    /// Committed and not completed command buffers; commit() waits for the oldest beyond it, so that scratch stays
    /// bounded. Two keep a device busy, the third covers jitter.
    uint32_t max_in_flight = 3;
  };

  /// Owned: commits to `queue`. `pool` must outlive the stream.
  CommandStream(NS::SharedPtr<MTL::CommandQueue> queue, BufferPool& pool, const Policy& policy);

  /// Borrowed: encodes into somebody's open encoder, never commits. The owner of `commands` ends the encoder, commits
  /// and checks for errors; scratch returns to the pool when `commands` completes. The stream must be destroyed
  /// before the owner commits. Without an encoder it opens its own, one for each dispatch while observing_times(); the
  /// owner calls end_encoding() and delivers take_times() when `commands` has completed. `key`: see track_of.
  /// `allocate`: gives scratch instead of the pool, where the owner has memory of its own for that; it keeps the
  /// buffers alive until the owner has committed.
  using Allocate = std::function<BufferView(size_t bytes)>;
  CommandStream(MTL::CommandBuffer* commands, MTL::ComputeCommandEncoder* encoder, BufferPool& pool,
                Allocate allocate = {}, const void* key = nullptr);

  /// Owned: what is encoded and not committed is dropped, what is committed is waited for, handlers included. Kept
  /// errors are lost. Not on the thread of its handlers. In the child of a fork nothing is waited for.
  ~CommandStream();
  CommandStream(const CommandStream&) = delete;
  CommandStream& operator=(const CommandStream&) = delete;

  // One dispatch: use, then bind every argument, then dispatch. Bindings stay until replaced, but a new pipeline's
  // arguments must all be bound again.
  void use(const Pipeline& pipeline);
  void bind(uint32_t index, const BufferView& view) { encoder_->setBuffer(view.buffer, view.offset, index); }
  /// A small struct, by value (at most 4 KiB).
  template <class T>
  void bind_value(uint32_t index, const T& value) {
    static_assert(sizeof(T) <= 4096);
    encoder_->setBytes(&value, sizeof(T), index);
  }
  void threadgroup_memory(uint32_t index, size_t bytes) {
    encoder_->setThreadgroupMemoryLength((bytes + 15) / 16 * 16, index); // Metal asks for multiples of 16
  }
  /// `threads` per threadgroup, in one dimension. `bytes`: what the dispatch reads and writes, for the commit policy.
  /// std::invalid_argument naming the kernel where `threads` exceeds what its pipeline allows.
  void dispatch(const MTL::Size& threadgroups, uint32_t threads, size_t bytes);

  /// Scratch of at least `bytes`, not reused by anybody before the command buffer being encoded has completed.
  BufferView scratch(size_t bytes);

  /// Calls `handler` when the command buffer being encoded has completed, failed or not: on a thread of this stream's
  /// own, in the order of the command buffers, which count as completed when it has returned. An exception it throws is
  /// kept like an error of the device. It must not use the stream (std::logic_error). Owned streams only.
  using Handler = std::function<void(const Completion&)>;
  void on_completed(Handler handler);

  /// Keeps `object` until the command buffer being encoded has completed. It is let go on the thread of the stream, by
  /// a later commit() that finds it completed, synchronize() or discard(). Owned streams only.
  void keep(std::shared_ptr<void> object);

  /// What is encoded next goes to another encoder of the same command buffer. Owned streams only.
  void end_encoder();

  // Order between this stream and others, by events: no thread waits. Owned streams only. Dispatches encoded later run
  // after the event has reached `value`; the event reaches `value` when all encoded before have run, which they do when
  // the stream commits.
  void wait_for(const MTL::Event* event, uint64_t value);
  void signal(const MTL::Event* event, uint64_t value);

  /// Ends the encoder, where it is this stream's own. What is encoded next opens another.
  void end_encoding();
  /// Device times of what was encoded while observing_times(); null where nothing was.
  std::unique_ptr<KernelTimes> take_times() { return encoding_ ? std::move(encoding_->times) : nullptr; }

  /// End of an operation: commits where the policy says so.
  void end_operation();
  /// Commits what is encoded, if anything. Waits for the oldest command buffer where too many are in flight.
  void commit();
  /// Commits, waits for everything, and throws the first error kept since the last call (ExecutionError).
  void synchronize();
  /// The same without commit and wait: throws what is known by now.
  void check();
  /// Drops what is encoded and not committed; its scratch is free at once. For the path of an exception.
  void discard() noexcept;

  /// The stream whose handler is the caller, or null.
  static const CommandStream* handling() { return handling_; }
  bool owned() const { return static_cast<bool>(queue_); }
  uint32_t in_flight() const;
  /// Dispatches encoded and not committed.
  uint32_t pending_dispatches() const { return pending_dispatches_; }

private:
  /// A command buffer and all that must live as long as it runs. Reused after completion.
  struct Submission final : CompletionThread::Task {
    explicit Submission(CommandStream* stream) : stream(stream) {}
    void run() noexcept override { stream->finish(*this); }

    CommandStream* const stream;
    NS::SharedPtr<MTL::CommandBuffer> commands;
    std::vector<const char*> kernels;
    std::vector<PooledBuffer> scratch;
    std::vector<Handler> handlers;
    std::vector<std::shared_ptr<void>> kept;
    std::unique_ptr<KernelTimes> times; // while observing_times()
    std::string error;
    double gpu_start = 0, gpu_end = 0;
    bool done = false; // under Completions::mutex
  };

  /// What Metal's threads share with the stream's.
  struct Completions {
    std::mutex mutex;
    std::condition_variable changed;
    std::string error;                        // first since the last synchronize
    std::unique_ptr<CompletionThread> thread; // from the first handler on
    std::atomic<CompletionThread*> posts_to{nullptr};
  };

  /// A command buffer to encode into.
  void open_commands();
  /// An encoder of it.
  void open();
  // While somebody looks (observer.h).
  void open_timed();
  void tell_dispatch(const MTL::Size& threadgroups, uint32_t threads, size_t bytes);
  void run_alone();
  /// Ends the encoder, if one is open: what follows stands between dispatches.
  MTL::CommandBuffer* commands_between_dispatches(const char* operation);
  void complete(Submission& submission, MTL::CommandBuffer* commands) noexcept; // on Metal's thread
  void finish(Submission& submission) noexcept; // there, or on the thread of the handlers where there is one
  bool oldest_is_done() const;
  void wait_for_oldest();
  void recycle_oldest();
  void recycle(std::unique_ptr<Submission> submission);
  /// std::runtime_error in the child of a fork, std::logic_error in a handler.
  void check_caller(const char* operation) const;
  bool forked() const { return generation_ != fork_generation(); }

  static thread_local const CommandStream* handling_;

  const NS::SharedPtr<MTL::CommandQueue> queue_;
  BufferPool& pool_;
  const Policy policy_;
  const Allocate allocate_; // borrowed; may be empty

  const void* const track_key_;
  const bool borrows_encoder_;
  NS::SharedPtr<MTL::ComputeCommandEncoder> encoder_;
  bool timed_ = false;        // the encoder is for one dispatch
  uint64_t encode_start_ = 0; // of the dispatch, while somebody looks
  const Pipeline* pipeline_ = nullptr;
  std::unique_ptr<Submission> encoding_;
  uint32_t pending_dispatches_ = 0;
  size_t pending_bytes_ = 0;

  std::deque<std::unique_ptr<Submission>> in_flight_; // oldest first; the stream's thread only
  std::vector<std::unique_ptr<Submission>> spare_;

  const uint32_t generation_ = fork_generation();
  std::unique_ptr<Completions> completions_ = std::make_unique<Completions>();
};

} // namespace metal_moe
