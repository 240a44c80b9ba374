// How the matrices of all experts of a part are stored, in one number that kernels may be compiled for. Shared with the
// host code that makes pipelines.
#pragma once
#include "../tiles/simd.h"

/// Function constants that kernels of quantised weights have: the codes of gate and up, or of the one matrix.
/// Undefined: the record of each expert tells.
SHARED_CONSTANT uint FIRST_CODE_INDEX = 0;
SHARED_CONSTANT uint SECOND_CODE_INDEX = 1;

/// From bit 0 format, from bit 4 half_bits, from bit 11 log2(group_size / 16), from bit 14 codebook, from bit 16
/// scale_type, at bit 19 whether rows of codes begin at multiples of 16 bytes. Fields as in ExpertMatrix; a group has
/// 16, 2 * 16, 4 * 16 or 8 * 16 columns. No format is 0, so no code is.
constexpr uint matrix_code(uint format, uint half_bits, uint group_size, uint codebook, uint scale_type, bool aligned) {
  const uint group = uint(group_size >= 2 * 16) + uint(group_size >= 4 * 16) + uint(group_size >= 8 * 16);
  return format | half_bits << 4 | group << 11 | codebook << 14 | scale_type << 16 | uint(aligned) << 19;
}
/// Added to the codes that packed products of rows of few columns are compiled for: see PACKED_SHORT_COLUMNS.
SHARED_CONSTANT uint CODE_SHORT_ROWS = 1u << 20;
constexpr bool code_short_rows(uint code) { return (code & CODE_SHORT_ROWS) != 0; }
constexpr uint code_format(uint code) { return code & 15; }
constexpr uint code_half_bits(uint code) { return code >> 4 & 127; }
constexpr uint code_group_size(uint code) { return 16u << (code >> 11 & 7); }
constexpr uint code_codebook(uint code) { return code >> 14 & 3; }
constexpr uint code_scale_type(uint code) { return code >> 16 & 7; }
constexpr bool code_aligned(uint code) { return (code >> 19 & 1) != 0; }

/// Whether codes of 4 bits can become operands of matrix instructions in place, beside activations of `element_bytes`
/// bytes, on a GPU whose engine does that: see moe/packed_product.h. Affine, 16-bit scales.
constexpr bool code_is_packed(uint code, uint element_bytes) {
  return code_format(code) == 1 && code_half_bits(code) == 8 && code_aligned(code) && element_bytes == 2 &&
         (code_scale_type(code) == 1 || code_scale_type(code) == 2);
}
