#pragma once

#include <chrono>
#include <exception>
#include <optional>
#include <pybind11/pybind11.h>
#include <thread>

// The interpreter's lock, for threads that may still run when the interpreter ends: daemon threads, and ours. Before
// Python 3.14, taking the lock then ends the thread by unwinding its stack, which no destructor lets through: the
// process would abort. As from Python 3.14 on, such a thread sleeps until the process is gone.

namespace metal_moe::bindings {

template <class Take>
void take_gil_or_sleep(const Take& take) {
  try {
    take();
  } catch (const std::exception&) {
    throw;
  } catch (...) {
    for (;;) // leaving this handler would abort, too
      std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

/// Lets other threads have the lock, which the thread holds, until the end of the scope.
class GilRelease {
public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    take_gil_or_sleep([this] { PyEval_RestoreThread(state_); });
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

private:
  PyThreadState* state_;
};

/// Holds the lock until the end of the scope, whether or not the thread holds it already.
class GilAcquire {
public:
  GilAcquire() {
    take_gil_or_sleep([this] { lock_.emplace(); });
  }

private:
  std::optional<pybind11::gil_scoped_acquire> lock_;
};

} // namespace metal_moe::bindings
