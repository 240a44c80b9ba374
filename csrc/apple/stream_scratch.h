// Scratch of operations on one of PyTorch's streams.
#pragma once

#include "../core/command_stream.h"

namespace at::mps {
class MPSStream;
}

namespace metal_moe::apple {

/// The same memory for every operation: a stream runs them one after another, so the next one may write what the last
/// one has read, and nothing is waited for or counted. PyTorch's allocator would do that too, but it must not be called
/// on the stream's queue, where operations are encoded: short of memory, it waits for that very queue.
///
/// Used on the stream's queue only.
class StreamScratch {
public:
  /// The one of `stream`; never freed, as PyTorch's streams are not.
  static StreamScratch& of(at::mps::MPSStream* stream);

  /// A new operation.
  void begin();
  /// Memory for the operation. What it does not find room for comes from `pool` and stays.
  BufferView allocate(BufferPool& pool, size_t bytes);
  /// Gives everything back to the pool when `commands`, the stream's command buffer, has completed.
  void release_after(MTL::CommandBuffer* commands);

private:
  std::vector<PooledBuffer> blocks_;
  size_t block_ = 0; // in use
  size_t used_ = 0;  // bytes of it
};

} // namespace metal_moe::apple
