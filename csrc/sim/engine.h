// What runs an encoded dispatch. One engine per device.
#pragma once

#include "kernel_library.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace metal_sim {

/// One encoded dispatch, validated. Only the entries of arguments that the kernel declares are set.
struct Dispatch {
  const Kernel* kernel;
  const KernelLibrary* library;
  std::atomic<uint32_t>* cost;      // the pipeline's: nanoseconds that a threadgroup took lately, 0 where unknown
  Size3 grid;                       // threadgroups
  Size3 group;                      // threads of each
  KernelArguments arguments;        // threadgroup pointers are the engine's to set
  size_t buffer_bytes[MAX_BUFFERS]; // from the bound offset to the end of the buffer
  uint32_t constants;               // a bit per buffer index that setBytes bound
  uint32_t threadgroup_bytes[MAX_THREADGROUP_ARGUMENTS];
};

/// Of the engines for processors: what every Apple GPU has.
constexpr uint32_t MAX_THREADGROUP_MEMORY = 32 << 10;

inline uint64_t volume(Size3 size) { return uint64_t(size.x) * size.y * size.z; }

/// Position of the `index`-th element, x fastest.
inline Size3 position(uint32_t index, Size3 size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

class Engine {
public:
  /// Threads of a threadgroup that the engine accepts.
  virtual uint32_t max_threads_per_threadgroup() const = 0;
  /// Bytes of threadgroup memory of one threadgroup.
  virtual uint32_t max_threadgroup_memory() const { return MAX_THREADGROUP_MEMORY; }
  virtual const char* name() const = 0;
  /// Runs a dispatch to its end. `sequence`: its place in its command buffer. Returns "", or what went wrong.
  virtual std::string run(const Dispatch& dispatch, uint32_t sequence) = 0;

  // What only some engines have.

  /// Kernels of the metallib `path`, alive for ever; null: they are in shared objects. std::runtime_error.
  virtual const KernelLibrary* open_library(const std::string& path) {
    (void)path;
    return nullptr;
  }
  /// `kernel` for the values of its function constants. Where it is compiled before there are values it is the same for
  /// all, and dispatches bring them.
  virtual const Kernel* specialize(const Kernel& kernel, const ConstantValue* values) {
    (void)values;
    return &kernel;
  }
  /// Makes `kernel` ready to run, its largest threadgroup known. Returns "", or what went wrong.
  virtual std::string prepare(const Kernel& kernel) {
    (void)kernel;
    return "";
  }
  virtual bool has_streams() const { return false; }
  /// Starts a dispatch on a stream of the program's, behind what is there. Returns "", or what went wrong.
  virtual std::string launch(const Dispatch& dispatch, void* stream) {
    (void)stream;
    return std::string("kernel '") + dispatch.kernel->name + "': engine " + name() + " has no streams";
  }

  /// Whether command encoders can be told to note when they begin and end.
  virtual bool tells_time() const { return false; }
  /// A moment: of the host's monotonic clock, or one that the device is to tell.
  struct Time {
    uint64_t nanoseconds = UNKNOWN_TIME;
    void* event = nullptr; // of the engine
  };
  static constexpr uint64_t UNKNOWN_TIME = ~uint64_t(0);
  /// What the device's moments are told from, as far as it needs something; null where it cannot be had.
  virtual std::shared_ptr<void> clock() { return nullptr; }
  /// When `stream` comes to what is launched next; unknown where the engine cannot tell.
  virtual Time time_on(void* stream) {
    (void)stream;
    return {};
  }
  /// Of the host's clock; waits for the moment.
  virtual uint64_t nanoseconds_of(const Time& time, const void* clock) {
    (void)clock;
    return time.nanoseconds;
  }
  virtual void release_time(const Time& time) noexcept { (void)time; }

  /// Whether buffers are ordinary memory of the process. Else the engine allocates them, null where it cannot.
  virtual bool host_memory() const { return true; }
  virtual size_t memory_size() const { return 0; }
  virtual void* allocate(size_t bytes) {
    (void)bytes;
    return nullptr;
  }
  virtual void release(void* memory) noexcept { (void)memory; }
  virtual void copy_in(void* to, const void* from, size_t bytes) { (void)to, (void)from, (void)bytes; }

protected:
  ~Engine() = default;
};

Engine& native_engine();
Engine& exact_engine();

} // namespace metal_sim
