// Encodes the experts of a layer one of whose products has trellis weights, or both.
#pragma once

#include "experts_encoding.h"

namespace metal_moe {

/// The dispatches of a layer with `trellis_gate_up`, `trellis_down` or both, any rates and codebooks, without shared
/// experts. `others` has the products with other weights, if there are any. Both: three dispatches for decode; else
/// six, as rotations are kernels between the products, and group.
void encode_trellis_experts(ExpertsEncoding& others);

} // namespace metal_moe
