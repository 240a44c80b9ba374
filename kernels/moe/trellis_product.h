// Arguments of `trellis_product_m4`, `_m8`, `_m16` and `_m64`: rotated rows times the tiles of their experts' trellis
// weights.
#pragma once
#include "../formats/trellis.h"
#include "../tiles/hadamard.h"

/// Simdgroups of a threadgroup on a GPU, which share K.
SHARED_CONSTANT uint TRELLIS_PRODUCT_SIMDGROUPS = 4;
/// Columns of tiles of a threadgroup. A one-thread simdgroup takes eight, whose codes lie side by side: each row of
/// tiles is a page or more from the next. So do simdgroups with matrix instructions, which then share their rows of x.
constexpr uint trellis_product_tiles(uint simd_width, bool matrix) { return simd_width == 1 || matrix ? 8 : 1; }
/// Rows of the smallest row tile, that of prefill4; base has 8, large_batch 16, or the most where experts have many.
SHARED_CONSTANT uint TRELLIS_PRODUCT_ROWS = 4;
SHARED_CONSTANT uint TRELLIS_PRODUCT_MOST_ROWS = 64;

/// Threadgroup memory: sums of each simdgroup; or 16 blocks of 128 inputs, one of each row if these are more, and a
/// factor of each, twice.
constexpr uint trellis_product_memory(uint rows, bool matrix) {
  return matrix ? 2 * (rows > 16 ? rows : 16) * (HADAMARD_BLOCK + 1) * 4
                : TRELLIS_PRODUCT_SIMDGROUPS * rows * TRELLIS_TILE * 4;
}

// Buffers: 0 x [1 or 2, S, rotated_stride], 1 codes, 2 table of the first matrix, 3 codes, 4 table of the second,
// 5 sorted_rows, 6 tiles, 7 out fp32 [slices, 1 or 2, S, outputs], 8 TrellisProductArgs; threadgroup 0:
// trellis_product_memory. Rows stand in order of assignment. Grid: (outputs / 16 / trellis_product_tiles, tiles,
// slices * matrices).
struct TrellisProductArgs {
  uint rows;    // S
  uint inputs;  // multiples of 128
  uint outputs; // multiples of 128
  uint slices;  // of the inputs, see trellis_slices.h
  uint matrices;
};
