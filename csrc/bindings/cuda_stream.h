// PyTorch's current CUDA stream and memory, for operations on CUDA tensors.
#pragma once

#include "torch_stream.h"

#include "../core/caller_stream.h"

#include <pybind11/pybind11.h>

#include <vector>

namespace metal_moe::bindings {

/// Scratch of one operation from PyTorch's caching allocator, which orders reuse by stream and keeps what a captured
/// graph uses for as long as the graph: nothing has to be waited for or counted here. The memory goes back to it when
/// this object ends, after the launch.
class TorchScratch {
public:
  /// With the interpreter's lock held. `device`: number of the CUDA device.
  TorchScratch(Context& context, int device) : context_(context), device_(device) {}
  ~TorchScratch();
  TorchScratch(const TorchScratch&) = delete;
  TorchScratch& operator=(const TorchScratch&) = delete;

  /// Without the interpreter's lock, or with it.
  BufferView allocate(size_t bytes);

private:
  void add_block(size_t bytes);

  Context& context_;
  const int device_;
  std::vector<PyObject*> tensors_;
  std::vector<NS::SharedPtr<MTL::Buffer>> blocks_;
  size_t used_ = 0;  // bytes of the last block
  size_t total_ = 0; // bytes asked for, in all
};

/// The stream that PyTorch enqueues to on CUDA device `device`, on this thread, now. With the interpreter's lock held.
void* current_cuda_stream(int device);

/// Number of the CUDA device whose engine is `engine` ("cuda", "cuda:1").
int cuda_device_number(const std::string& engine);

} // namespace metal_moe::bindings
