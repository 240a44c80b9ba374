// Everything that one device needs, made once: the device itself, its kernel library, pipelines, scratch and streams.
#pragma once

#include "buffer_pool.h"
#include "command_stream.h"
#include "library.h"
#include "pipeline_cache.h"

#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace metal_moe {

/// Thread-safe. Nothing else in the product creates Metal objects that outlive a call.
class Context {
public:
  /// A context of its own for the device whose name begins with `device_name` ("native", "exact"; "cuda", "cuda:1", ...
  /// where there are NVIDIA GPUs; on Apple's Metal "mps", as PyTorch calls the GPU; "" is the system's default device),
  /// with the metallib at `library_path`. "null" is native without running a kernel, for benchmarks: no listing has it.
  /// std::invalid_argument listing the devices where there is none of that name, std::runtime_error where the library
  /// cannot be loaded.
  Context(const std::string& device_name, std::string library_path);
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  MTL::Device* device() const { return device_.get(); }
  const Library& library() const { return library_; }
  PipelineCache& pipelines() { return pipelines_; }
  BufferPool& pool() { return pool_; }

  /// First word of the device's name: "native", "exact", "cuda"; "mps" on Apple's Metal.
  const std::string& engine() const { return engine_; }
  /// The device's whole name.
  const std::string& device_name() const { return name_; }

  /// A new owned stream with a queue of its own.
  std::unique_ptr<CommandStream> new_stream(const CommandStream::Policy& policy = {});

  /// std::runtime_error in the child of a fork where the device is a GPU, which stays with the parent.
  void check_process() const {
    if (runs_on_caller_streams())
      check_not_forked(name_.c_str(), made_in_);
  }

  /// Whether operations run on streams of the program, PyTorch's, instead of a queue of their own.
  bool runs_on_caller_streams() const { return on_apple() || caller_queue_; }
  /// What command buffers on streams of the program are made from; null where there are none.
  MTL::CommandQueue* caller_queue() const { return caller_queue_.get(); }

  /// Memory of the caller as a buffer, in place: not copied, not owned, and to be kept until the work that uses it has
  /// completed. `bytes` > 0. std::runtime_error where the device cannot map it.
  NS::SharedPtr<MTL::Buffer> wrap(const void* memory, size_t bytes) const;

private:
  friend class StreamLease;

  static constexpr bool on_apple() {
#if defined(__APPLE__)
    return true;
#else
    return false;
#endif
  }

  NS::SharedPtr<MTL::Device> device_;
  const std::string name_;
  const std::string engine_;
  const uint32_t made_in_ = fork_generation();
  Library library_;
  PipelineCache pipelines_;
  BufferPool pool_;
  NS::SharedPtr<MTL::CommandQueue> caller_queue_;

  std::mutex mutex_;
  const ForkGuard guard_{mutex_};
  std::vector<std::unique_ptr<CommandStream>> idle_streams_;
  uint32_t generation_ = fork_generation(); // of the idle streams
};

/// An idle owned stream of a context for the length of a synchronous call: as many exist as calls were ever in progress
/// at once. What the call leaves uncommitted (an exception passed by) is dropped.
class StreamLease {
public:
  explicit StreamLease(Context& context);
  ~StreamLease();
  StreamLease(const StreamLease&) = delete;
  StreamLease& operator=(const StreamLease&) = delete;

  CommandStream& operator*() const { return *stream_; }
  CommandStream* operator->() const { return stream_.get(); }

private:
  Context& context_;
  const uint32_t generation_;
  std::unique_ptr<CommandStream> stream_;
};

} // namespace metal_moe
