// Arguments of `trellis_product_m4`, `_m8` and `_m16`: rotated rows times the tiles of their experts' trellis weights.
#pragma once
#include "../formats/trellis.h"

/// Simdgroups of a threadgroup on a GPU, which share K.
SHARED_CONSTANT uint TRELLIS_PRODUCT_SIMDGROUPS = 4;
/// Tiles of outputs of a threadgroup. A one-thread simdgroup takes eight, whose codes lie side by side: each row of
/// tiles is a page or more from the next.
constexpr uint trellis_product_tiles(uint simd_width) { return simd_width == 1 ? 8 : 1; }
/// Rows of the smallest row tile, that of prefill4; base has 8, large_batch 16.
SHARED_CONSTANT uint TRELLIS_PRODUCT_ROWS = 4;

/// Threadgroup memory: sums of each simdgroup.
constexpr uint trellis_product_memory(uint rows) { return TRELLIS_PRODUCT_SIMDGROUPS * rows * TRELLIS_TILE * 4; }

// Buffers: 0 x fp32 [1 or 2, S, inputs], 1 codes, 2 table of the first matrix, 3 codes, 4 table of the second,
// 5 sorted_rows, 6 tiles, 7 out fp32 [1 or 2, S, outputs], 8 TrellisProductArgs; threadgroup 0: trellis_product_memory.
// Rows stand in order of assignment. Grid: (outputs / 16 / trellis_product_tiles, tiles, 1 or 2).
struct TrellisProductArgs {
  uint rows;    // S
  uint inputs;  // multiples of 128
  uint outputs; // multiples of 128
};
