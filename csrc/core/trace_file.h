// A Chrome trace: events as a JSON array, which Perfetto and chrome://tracing read.
//
// The file is a whole JSON array after every write: each ends with the closing bracket, which the next one overwrites.
// So a process may end in any way. Two processes never write one file: a forked child, and another process that finds
// the file in use, writes `name.<pid>.json` beside it, once it has something to write.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace metal_moe {

/// Thread-safe.
class TraceFile {
public:
  explicit TraceFile(std::string path) : path_(std::move(path)) {}
  ~TraceFile();
  TraceFile(const TraceFile&) = delete;
  TraceFile& operator=(const TraceFile&) = delete;

  /// An event that has a length. Times in nanoseconds; `arguments`: members of a JSON object, or "".
  void span(const char* category, const std::string& name, uint64_t track, uint64_t start, uint64_t end,
            const std::string& arguments);
  /// One that has none.
  void instant(const char* category, const std::string& name, uint64_t track, uint64_t time,
               const std::string& arguments);
  /// What a viewer calls the track.
  void name_track(uint64_t track, const std::string& name);
  /// Writes what is kept in memory.
  void flush();

  /// Around fork(): the child must not find the lock held by a thread that it does not have.
  void before_fork() { mutex_.lock(); }
  void after_fork_in_parent() { mutex_.unlock(); }
  void after_fork_in_child();

private:
  void add(const std::string& event, uint64_t time); // with the lock held
  void add_name(uint64_t track, const std::string& name);
  void write(); // with the lock held
  bool open();
  void fail(const char* what);

  /// Memory before a write, and the longest time between writes in nanoseconds.
  static constexpr size_t BUFFER_BYTES = 256 << 10;
  static constexpr uint64_t WRITE_INTERVAL = 500'000'000;

  std::mutex mutex_;
  std::string path_;
  std::string pending_;                                 // events, each with ",\n" in front
  std::vector<std::pair<uint64_t, std::string>> names_; // of tracks: a forked child's file has them too
  int file_ = -1;
  bool failed_ = false;
  bool forked_ = false;
  uint64_t size_ = 0; // of the file, without the closing bracket
  uint64_t last_write_ = 0;
};

/// `text` between quotation marks of JSON.
std::string json_text(const std::string& text);

} // namespace metal_moe
