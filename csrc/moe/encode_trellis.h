// Encodes the kernels of trellis weights that stand outside of a layer: decoding whole matrices, and the search of the
// quantiser.
#pragma once

#include "engine.h"

namespace metal_moe {

/// out fp32 [n, rows, columns] of matrices with equal settings. codes int32 [n, columns / 16, words of a row of tiles]
/// and suh fp16 [n, columns], svh fp16 [n, rows], their last dimension contiguous; rows and columns are multiples of
/// 128, out is contiguous. One dispatch; none where out is empty.
void encode_dequantize_trellis(CommandStream& stream, MoeEngine& engine, const TensorView& codes, const TensorView& suh,
                               const TensorView& svh, uint32_t half_bits, uint32_t codebook, const TensorView& out);

/// states int32 [tiles, 256] of values fp32 [tiles, 256], with the codebook as table fp32 [65536]; all contiguous. One
/// dispatch; none where there are no tiles.
void encode_viterbi(CommandStream& stream, MoeEngine& engine, const TensorView& values, const TensorView& table,
                    uint32_t half_bits, const TensorView& states);

} // namespace metal_moe
