// Encodes `gather_experts`: the weights of selected experts, copied.
#pragma once

#include "engine.h"

namespace metal_moe {

/// weights [E, ...] contiguous, ids [n] of any stride, out [n, ...] contiguous. One dispatch; none where out is empty.
void encode_gather(CommandStream& stream, MoeEngine& engine, const TensorView& weights, const TensorView& ids,
                   const TensorView& out);

} // namespace metal_moe
