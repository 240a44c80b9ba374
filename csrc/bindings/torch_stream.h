// PyTorch's current stream of a GPU, for operations on its tensors: cuda_stream.cpp, apple/mps_stream.mm.
#pragma once

#include "../core/context.h"

#include <functional>

namespace metal_moe::bindings {

/// Encodes with `encode(stream)` behind what PyTorch's current stream holds, and waits for nothing. With the
/// interpreter's lock held, which is released meanwhile. What `encode` throws comes back; ExecutionError naming the
/// kernel where a launch fails.
void run_on_current_stream(Context& context, const std::function<void(CommandStream&)>& encode);

/// Gives back what is kept as scratch for operations on PyTorch's streams, once they have run.
void release_stream_scratch(Context& context);

} // namespace metal_moe::bindings
