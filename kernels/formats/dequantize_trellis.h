// Arguments of `dequantize_trellis`: trellis weights as fp32 matrices.
#pragma once
#include "../tiles/hadamard.h"
#include "trellis.h"

SHARED_CONSTANT uint DEQUANTIZE_SIMDGROUPS = 4;

// Buffers: 0 codes, 1 suh fp16, 2 svh fp16, 3 out fp32 [n, rows, columns], 4 DequantizeTrellisArgs.
// Grid: (columns / 128, rows / 128, n): a threadgroup makes one block of 128 x 128.
struct DequantizeTrellisArgs {
  uint rows; // outputs and inputs, multiples of 128
  uint columns;
  uint half_bits;
  uint codebook;     // TrellisCodebook
  uint codes_stride; // words from a matrix to the next
  uint row_stride;   // words from a row of tiles (16 columns of the matrix) to the next
  uint suh_stride;   // elements from a matrix to the next
  uint svh_stride;
};
