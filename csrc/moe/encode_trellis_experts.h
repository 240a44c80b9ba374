// Encodes the experts of a layer whose weights are trellis codes: products with rotated weights, and the rotations of
// activations around them.
#pragma once

#include "encode_experts.h"

namespace metal_moe {

/// encode_experts for gate, up and down in trellis codes of any rates and codebooks, without shared experts and not
/// interleaved: three dispatches for one token; else six, as rotations are kernels between the products, and group.
void encode_trellis_experts(CommandStream& stream, MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                            const SlotsView& ids, const SlotsView& weights, uint32_t top_k, const TensorView& out);

} // namespace metal_moe
