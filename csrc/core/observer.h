// Tells whoever looks what the library does: the log, the trace file and profiles. While nobody looks, each place that
// could tell something costs one branch on observing(); no text is made and no clock is read.
#pragma once

#include "dispatch_record.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace metal_moe {

class KernelTimes;

namespace observing_detail {
enum : uint32_t { Log = 1, Trace = 2, Profile = 4 };
extern std::atomic<uint32_t> who;
} // namespace observing_detail

/// Whether anybody looks.
inline bool observing() { return observing_detail::who.load(std::memory_order_relaxed) != 0; }
/// Whether anybody wants to know the time that the device takes.
inline bool observing_times() {
  return (observing_detail::who.load(std::memory_order_relaxed) &
          (observing_detail::Trace | observing_detail::Profile)) != 0;
}

/// Nanoseconds of the host's monotonic clock, which device times are told in as well.
uint64_t clock_now();

/// Lines on stderr, for each dispatch and commit.
void start_log();
/// A Chrome trace (JSON, for Perfetto) of everything from now on; see trace_file.h.
void start_trace(const std::string& path);
/// Both end; what is known by now is written.
void stop_log_and_trace();

/// Time and bytes by kernel. Any number may run at once, in any thread; each sees all threads.
class Profile {
public:
  struct Kernel {
    std::string engine, family, kernel;
    uint64_t dispatches = 0;
    uint64_t timed = 0;    // dispatches whose time is known; the others are left out of what follows but encode_ns
    uint64_t bytes = 0;    // declared by them
    uint64_t total_ns = 0; // on the device
    uint64_t least_ns = 0;
    uint64_t most_ns = 0;
    uint64_t encode_ns = 0; // on the host, of all
  };

  /// Begins.
  Profile();
  ~Profile() { stop(); }
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  /// Dispatches that are encoded from now on do not count. Those encoded before do as soon as their time is known.
  void stop();
  /// In order of first dispatch.
  std::vector<Kernel> kernels() const;

  struct State;

private:
  std::shared_ptr<State> state_;
};

// What the library tells. Call only where observing().

/// A dispatch has been encoded. Its times come later, or never: deliver().
void tell_dispatch(const DispatchRecord& record);
/// `dispatches` have been committed to the track's queue.
void tell_commit(uint32_t track, const char* engine, uint32_t dispatches);
/// This thread has waited for `what` since `start`.
void tell_wait(const char* what, uint64_t start);
/// What a user would not expect.
void tell_note(const std::string& text);
/// An operation of this thread has ended: that of last_dispatch().
void tell_operation(uint64_t start);

/// Device times of a command buffer that has completed.
void deliver(KernelTimes& times);
/// The same later, by collect(): of a command buffer on a stream of the program's, which nobody here waits for.
void deliver_later(std::unique_ptr<KernelTimes> times);
/// Waits for what deliver_later() was given, on the device, and delivers it.
void collect();

/// A number for a queue or stream of the device, the same for a key as long as the program runs.
uint32_t track_of(const void* key, const char* engine);

/// For the length of a wait; `what` has static storage.
class ObservedWait {
public:
  explicit ObservedWait(const char* what) : what_(what), start_(observing() ? clock_now() : 0) {}
  ~ObservedWait() {
    if (start_) [[unlikely]]
      tell_wait(what_, start_);
  }
  ObservedWait(const ObservedWait&) = delete;
  ObservedWait& operator=(const ObservedWait&) = delete;

private:
  const char* const what_;
  const uint64_t start_;
};

/// For the length of an operation.
class ObservedOperation {
public:
  ObservedOperation() : start_(observing() ? clock_now() : 0) {}
  ~ObservedOperation() {
    if (start_) [[unlikely]]
      tell_operation(start_);
  }
  ObservedOperation(const ObservedOperation&) = delete;
  ObservedOperation& operator=(const ObservedOperation&) = delete;

private:
  const uint64_t start_;
};

} // namespace metal_moe
