#include "trace_file.h"

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

namespace metal_moe {

namespace {

constexpr char CLOSE[] = "\n]\n";

/// `name.json` -> `name.<pid>.json`
std::string own_path(const std::string& path) {
  const size_t dot = path.rfind('.');
  return path.substr(0, dot) + "." + std::to_string(getpid()) + (dot == std::string::npos ? "" : path.substr(dot));
}

/// Takes the file for this process; -1 where another has it or it cannot be opened.
int take(const std::string& path) {
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (file < 0)
    return -1;
  if (flock(file, LOCK_EX | LOCK_NB) == 0 && ftruncate(file, 0) == 0)
    return file;
  const int reason = errno;
  close(file);
  errno = reason;
  return -1;
}

/// Microseconds, the unit of the format, with three decimals.
std::string microseconds(uint64_t nanoseconds) {
  char text[40];
  std::snprintf(text, sizeof text, "%" PRIu64 ".%03u", nanoseconds / 1000, static_cast<unsigned>(nanoseconds % 1000));
  return text;
}

std::string begin_event(const char* phase, const char* category, const std::string& name, uint64_t track) {
  return ",\n{\"ph\":\"" + std::string(phase) + "\",\"cat\":\"" + category + "\",\"name\":" + json_text(name) +
         ",\"pid\":" + std::to_string(getpid()) + ",\"tid\":" + std::to_string(track);
}

std::string end_event(const std::string& arguments) {
  return arguments.empty() ? "}" : ",\"args\":{" + arguments + "}}";
}

} // namespace

std::string json_text(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out += '"';
}

TraceFile::~TraceFile() {
  flush();
  if (file_ >= 0)
    close(file_);
}

void TraceFile::span(const char* category, const std::string& name, uint64_t track, uint64_t start, uint64_t end,
                     const std::string& arguments) {
  const std::lock_guard lock(mutex_);
  add(begin_event("X", category, name, track) + ",\"ts\":" + microseconds(start) +
          ",\"dur\":" + microseconds(end - start) + end_event(arguments),
      end);
}

void TraceFile::instant(const char* category, const std::string& name, uint64_t track, uint64_t time,
                        const std::string& arguments) {
  const std::lock_guard lock(mutex_);
  add(begin_event("i", category, name, track) + ",\"s\":\"t\",\"ts\":" + microseconds(time) + end_event(arguments),
      time);
}

void TraceFile::name_track(uint64_t track, const std::string& name) {
  const std::lock_guard lock(mutex_);
  names_.emplace_back(track, name);
  add_name(track, name);
}

void TraceFile::add_name(uint64_t track, const std::string& name) {
  pending_ += begin_event("M", "track", "thread_name", track) + end_event("\"name\":" + json_text(name));
}

void TraceFile::add(const std::string& event, uint64_t time) {
  if (failed_)
    return;
  pending_ += event;
  if (pending_.size() >= BUFFER_BYTES || time > last_write_ + WRITE_INTERVAL) {
    last_write_ = time;
    write();
  }
}

void TraceFile::flush() {
  const std::lock_guard lock(mutex_);
  write();
}

bool TraceFile::open() {
  file_ = take(path_);
  if (file_ < 0 && errno == EWOULDBLOCK) {
    path_ = own_path(path_);
    file_ = take(path_);
  }
  if (file_ < 0)
    fail("cannot be opened");
  return file_ >= 0;
}

/// A trace is no reason to stop computing: says so once, and goes on without.
void TraceFile::fail(const char* what) {
  std::fprintf(stderr, "metal_moe: METAL_MOE_TRACE: '%s' %s: %s\n", path_.c_str(), what, std::strerror(errno));
  failed_ = true;
  pending_.clear();
}

void TraceFile::write() {
  if (pending_.empty() || failed_ || (file_ < 0 && !open()))
    return;
  if (size_ == 0) {
    pending_.replace(0, 1, "["); // in place of the first comma
    pending_ += begin_event("M", "track", "process_name", 0) + end_event("\"name\":\"metal_moe\"");
    if (forked_)
      for (const auto& [track, name] : names_)
        add_name(track, name);
  }
  const size_t events = pending_.size();
  pending_ += CLOSE;
  for (size_t written = 0; written < pending_.size();) {
    const ssize_t count =
        pwrite(file_, pending_.data() + written, pending_.size() - written, static_cast<off_t>(size_ + written));
    if (count < 0 && errno == EINTR)
      continue;
    if (count < 0)
      return fail("cannot be written");
    written += static_cast<size_t>(count);
  }
  size_ += events;
  pending_.clear();
}

void TraceFile::after_fork_in_child() {
  if (file_ >= 0)
    close(file_); // the parent's; its lock stays with the parent
  file_ = -1;
  size_ = 0;
  pending_.clear();
  failed_ = false;
  path_ = own_path(path_);
  forked_ = true;
  mutex_.unlock();
}

} // namespace metal_moe
