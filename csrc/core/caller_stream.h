// One operation on a stream that belongs to the program: PyTorch's current CUDA stream. Encoded, launched behind what
// the stream holds, and not waited for.
#pragma once

#include "context.h"

namespace metal_moe {

class CallerStream {
public:
  /// `handle`: a CUstream of the context's device. `allocate`: scratch whose memory is reused in the stream's order.
  CallerStream(Context& context, void* handle, CommandStream::Allocate allocate);
  ~CallerStream();
  CallerStream(const CallerStream&) = delete;
  CallerStream& operator=(const CallerStream&) = delete;

  CommandStream& operator*() { return stream_; }

  /// Launches what was encoded. ExecutionError naming the kernel where that fails. Without it nothing is launched.
  void commit();

private:
  const void* const handle_;
  NS::SharedPtr<MTL::CommandBuffer> commands_;
  NS::SharedPtr<MTL::ComputeCommandEncoder> encoder_; // null: the stream opens its own, which are timed
  CommandStream stream_;
  bool ended_ = false;
};

} // namespace metal_moe
