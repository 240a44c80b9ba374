// Encodes `lora`: a low-rank addition to a linear layer.
#pragma once

#include "encode_matmul.h"

namespace metal_moe {

struct LoraLayer {
  TensorView a;           // [L, r, inputs], rows contiguous
  TensorView b;           // [L, outputs, r], rows contiguous
  TensorView base;        // [T, outputs], rows contiguous; absent: 0
  TensorView adapter_ids; // [T] int32 or int64; absent: every token has adapter 0
  TensorView scales;      // [L] fp32 contiguous; absent: `scale`
  float scale = 1.0f;
};

/// out [T, outputs] contiguous = base + scale * (x A^T) B^T, x [T, inputs] with contiguous rows. Two dispatches; none
/// where out is empty. Sizes other than T must not be 0. std::invalid_argument naming an argument that has other limits
/// or does not go with `kernel` (simdgroup matrices have one adapter).
void encode_lora(CommandStream& stream, MoeEngine& engine, const TensorView& x, const LoraLayer& layer,
                 MatmulKernel kernel, const TensorView& out);

} // namespace metal_moe
