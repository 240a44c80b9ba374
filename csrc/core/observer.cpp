#include "observer.h"

#include "kernel_times.h"
#include "trace_file.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <pthread.h>
#include <tuple>

namespace metal_moe {

namespace observing_detail {
std::atomic<uint32_t> who{0};
}

struct Profile::State {
  uint64_t begin = clock_now();
  uint64_t end = UINT64_MAX;
  std::vector<Kernel> kernels;
  std::map<std::tuple<const char*, const char*, const char*>, size_t> places; // by engine, family, kernel

  Kernel& of(const DispatchRecord& record) {
    const auto [place, added] = places.try_emplace({record.engine, record.family, record.kernel}, kernels.size());
    if (added) {
      kernels.emplace_back();
      kernels.back().engine = record.engine;
      kernels.back().family = record.family;
      kernels.back().kernel = record.kernel;
    }
    return kernels[place->second];
  }
};

namespace {

/// Host threads have tracks from 1 on, queues and streams of devices from here on.
constexpr uint64_t DEVICE_TRACKS = 1'000'000;
/// Command buffers whose times are read later; the oldest is waited for beyond it.
constexpr size_t MAX_LATER = 256;

struct Observers {
  std::mutex mutex; // of all but the trace file, which has its own
  std::shared_ptr<TraceFile> trace;
  std::vector<std::weak_ptr<Profile::State>> profiles;
  std::deque<std::unique_ptr<KernelTimes>> later;
  std::map<const void*, uint32_t> tracks;
  std::atomic<uint64_t> threads{0};
};

/// Never freed: completion handlers may run while static objects are destroyed.
Observers& observers() {
  static auto* made = new Observers;
  return *made;
}

void look(uint32_t bit, bool on) {
  if (on)
    observing_detail::who.fetch_or(bit, std::memory_order_relaxed);
  else
    observing_detail::who.fetch_and(~bit, std::memory_order_relaxed);
}

bool looks(uint32_t bit) { return (observing_detail::who.load(std::memory_order_relaxed) & bit) != 0; }

std::shared_ptr<TraceFile> trace_file() {
  const std::lock_guard lock(observers().mutex);
  return observers().trace;
}

/// This thread's track. Named when it is first used.
uint64_t thread_track(TraceFile& trace) {
  thread_local uint64_t track = 0;
  if (track == 0) {
    track = ++observers().threads;
    char name[64] = "";
    pthread_getname_np(pthread_self(), name, sizeof name);
    trace.name_track(track, "thread " + std::to_string(track) + (*name ? std::string(" (") + name + ")" : ""));
  }
  return track;
}

std::string grid_text(const DispatchRecord& record) {
  return std::to_string(record.grid[0]) + "x" + std::to_string(record.grid[1]) + "x" + std::to_string(record.grid[2]);
}

std::string arguments_of(const DispatchRecord& record) {
  return "\"operation\":" + json_text(record.operation) + ",\"family\":" + json_text(record.family) +
         ",\"chosen_by\":" + json_text(family_choice_name(record.choice)) + ",\"grid\":\"" + grid_text(record) +
         "\",\"threads\":" + std::to_string(record.threads) + ",\"bytes\":" + std::to_string(record.bytes);
}

void before_fork() {
  observers().mutex.lock();
  if (observers().trace)
    observers().trace->before_fork();
}
void after_fork_in_parent() {
  if (observers().trace)
    observers().trace->after_fork_in_parent();
  observers().mutex.unlock();
}
void after_fork_in_child() {
  if (observers().trace)
    observers().trace->after_fork_in_child();
  for (auto& times : observers().later)
    (void)times.release(); // the parent's device
  observers().later.clear();
  observers().mutex.unlock();
}

void flush_at_exit() {
  if (const auto trace = trace_file())
    trace->flush();
}

} // namespace

uint64_t clock_now() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

void start_log() { look(observing_detail::Log, true); }

void start_trace(const std::string& path) {
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    std::atexit(flush_at_exit);
  });
  auto trace = std::make_shared<TraceFile>(path);
  const std::lock_guard lock(observers().mutex);
  std::swap(observers().trace, trace);
  look(observing_detail::Trace, true);
}

void stop_log_and_trace() {
  look(observing_detail::Log | observing_detail::Trace, false);
  collect();
  std::shared_ptr<TraceFile> trace; // ends here, without the lock
  const std::lock_guard lock(observers().mutex);
  std::swap(observers().trace, trace);
}

Profile::Profile() : state_(std::make_shared<State>()) {
  const std::lock_guard lock(observers().mutex);
  observers().profiles.push_back(state_);
  look(observing_detail::Profile, true);
}

void Profile::stop() {
  const std::lock_guard lock(observers().mutex);
  if (state_->end != UINT64_MAX)
    return;
  state_->end = clock_now();
  auto& profiles = observers().profiles;
  std::erase_if(profiles, [](const auto& profile) { return profile.expired(); });
  look(observing_detail::Profile, std::any_of(profiles.begin(), profiles.end(), [](const auto& profile) {
         const auto state = profile.lock();
         return state && state->end == UINT64_MAX;
       }));
}

std::vector<Profile::Kernel> Profile::kernels() const {
  const std::lock_guard lock(observers().mutex);
  return state_->kernels;
}

void tell_dispatch(const DispatchRecord& record) {
  if (looks(observing_detail::Log))
    std::fprintf(stderr, "metal_moe: %s on %s: %s grid %s threads %u bytes %zu%s%s%s%s%s\n", record.operation,
                 record.engine, record.kernel, grid_text(record).c_str(), record.threads, record.bytes,
                 *record.family ? " family " : "", record.family, *record.family ? " (by " : "",
                 family_choice_name(record.choice), *record.family ? ")" : "");
  if (const auto trace = looks(observing_detail::Trace) ? trace_file() : nullptr)
    trace->span("encode", record.kernel, thread_track(*trace), record.encode_start, record.encode_end,
                arguments_of(record));
  if (!looks(observing_detail::Profile))
    return;
  const std::lock_guard lock(observers().mutex);
  for (const auto& profile : observers().profiles)
    if (const auto state = profile.lock(); state && record.encode_start >= state->begin && state->end == UINT64_MAX) {
      Profile::Kernel& kernel = state->of(record);
      kernel.dispatches += 1;
      kernel.encode_ns += record.encode_end - record.encode_start;
    }
}

void tell_commit(uint32_t track, const char* engine, uint32_t dispatches) {
  if (looks(observing_detail::Log))
    std::fprintf(stderr, "metal_moe: %s stream %u: commit of %u dispatches\n", engine, track, dispatches);
  if (const auto trace = looks(observing_detail::Trace) ? trace_file() : nullptr)
    trace->instant("commit", "commit", thread_track(*trace), clock_now(),
                   "\"stream\":" + std::to_string(track) + ",\"dispatches\":" + std::to_string(dispatches));
}

void tell_wait(const char* what, uint64_t start) {
  if (const auto trace = looks(observing_detail::Trace) ? trace_file() : nullptr)
    trace->span("wait", what, thread_track(*trace), start, clock_now(), "");
}

void tell_note(const std::string& text) {
  if (looks(observing_detail::Log))
    std::fprintf(stderr, "metal_moe: %s\n", text.c_str());
  if (const auto trace = looks(observing_detail::Trace) ? trace_file() : nullptr)
    trace->instant("note", text, thread_track(*trace), clock_now(), "");
}

void tell_operation(uint64_t start) {
  const auto trace = looks(observing_detail::Trace) ? trace_file() : nullptr;
  if (!trace)
    return;
  const DispatchTrace& last = last_dispatch();
  trace->span("operation", last.operation, thread_track(*trace), start, clock_now(),
              "\"engine\":" + json_text(last.engine) + ",\"family\":" + json_text(last.family) + ",\"chosen_by\":" +
                  json_text(family_choice_name(last.choice)) + ",\"dispatches\":" + std::to_string(last.dispatches) +
                  (*last.layer_batch ? ",\"layer_batch\":" + json_text(last.layer_batch) : ""));
}

void deliver(KernelTimes& times) {
  times.resolve();
  const std::vector<DispatchRecord> records = times.records();
  if (const auto trace = trace_file())
    for (const DispatchRecord& record : records)
      if (record.device_start)
        trace->span("device", record.kernel, DEVICE_TRACKS + record.track, record.device_start, record.device_end,
                    arguments_of(record));
  const std::lock_guard lock(observers().mutex);
  for (const auto& profile : observers().profiles) {
    const auto state = profile.lock();
    if (!state)
      continue;
    for (const DispatchRecord& record : records) {
      if (!record.device_start || record.encode_start < state->begin || record.encode_end > state->end)
        continue;
      Profile::Kernel& kernel = state->of(record);
      const uint64_t time = record.device_end - record.device_start;
      kernel.least_ns = kernel.timed ? std::min(kernel.least_ns, time) : time;
      kernel.most_ns = std::max(kernel.most_ns, time);
      kernel.timed += 1;
      kernel.total_ns += time;
      kernel.bytes += record.bytes;
    }
  }
}

void deliver_later(std::unique_ptr<KernelTimes> times) {
  std::unique_ptr<KernelTimes> oldest;
  {
    const std::lock_guard lock(observers().mutex);
    observers().later.push_back(std::move(times));
    if (observers().later.size() > MAX_LATER) {
      oldest = std::move(observers().later.front());
      observers().later.pop_front();
    }
  }
  if (oldest)
    deliver(*oldest);
}

void collect() {
  std::deque<std::unique_ptr<KernelTimes>> all;
  {
    const std::lock_guard lock(observers().mutex);
    all.swap(observers().later);
  }
  for (const auto& times : all)
    deliver(*times);
  if (const auto trace = trace_file())
    trace->flush();
}

uint32_t track_of(const void* key, const char* engine) {
  uint32_t track = 0;
  std::shared_ptr<TraceFile> trace;
  {
    const std::lock_guard lock(observers().mutex);
    auto& tracks = observers().tracks;
    const auto [place, added] = tracks.try_emplace(key, static_cast<uint32_t>(tracks.size() + 1));
    track = place->second;
    if (added)
      trace = observers().trace;
  }
  if (trace)
    trace->name_track(DEVICE_TRACKS + track, std::string(engine) + " stream " + std::to_string(track));
  return track;
}

} // namespace metal_moe
