// Operations on MPS tensors on a queue of their own, ordered against PyTorch's stream by a shared event.
#pragma once

#include "../core/context.h"

#include <functional>

namespace metal_moe::apple {

/// Whether METAL_MOE_MPS_QUEUE is "own": for comparing with PyTorch's stream, which is the default and the cheaper way.
/// std::invalid_argument where it is anything but "own" or "torch".
bool uses_own_queue();

/// Encodes with `encode(stream)` on an owned stream and commits it: after what PyTorch's current stream holds now, and
/// before what it is given later. The CPU waits only where too many command buffers of the stream are in flight;
/// PyTorch's is committed, as the stream would otherwise wait for an event that nobody is about to signal. An error of
/// the GPU is thrown by a later call (ExecutionError).
void run_on_own_queue(Context& context, const std::function<void(CommandStream&)>& encode);

} // namespace metal_moe::apple
