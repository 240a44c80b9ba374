// Arguments of `trellis_gate_up_decode` and `trellis_down_decode`: one token's experts with trellis weights, rotations
// included.
#pragma once
#include "rotate.h"
#include "rotated_row.h"
#include "trellis_slices.h"

/// Simdgroups of a threadgroup on a GPU, which divide its columns.
SHARED_CONSTANT uint TRELLIS_DECODE_SIMDGROUPS = 8;
/// Columns of tiles of a simdgroup. Two share what is done for an input; a one-thread simdgroup takes as many as make
/// the rotation of its inputs little beside them.
constexpr uint trellis_decode_tiles(uint simd_width) { return simd_width == 1 ? 2 * TRELLIS_TILE : 2; }
/// Outputs of a threadgroup.
constexpr uint trellis_decode_columns(uint simd_width) {
  return simdgroups(TRELLIS_DECODE_SIMDGROUPS, simd_width) * trellis_decode_tiles(simd_width) * TRELLIS_TILE;
}
/// The most blocks of 128 inputs of a slice: threadgroup memory of 8 KiB.
SHARED_CONSTANT uint TRELLIS_DECODE_MAX_BLOCKS = 16;
/// Rows of tiles whose codes are asked for before the inputs are rotated: 32 KiB with four bits.
SHARED_CONSTANT uint TRELLIS_DECODE_PREFETCH = 16;

// S = top_k assignments (of one token, but nothing depends on it), I' and H' as in rotate.h. P = 2 matrices, gate and
// up; without a gate 1. Slice s begins with block trellis_slice(s) of the inputs; `blocks`: the most that one has.
//
//  trellis_gate_up_decode : 0 x [T, H], 1 ids, 2 gate codes, 3 gate scales, 4 gate table, 5 up codes, 6 up scales,
//                           7 up table, 8 h out fp32 [slices, P, S, I'], 9 TrellisDecodeArgs; threadgroup 0:
//                           rotated_row_bytes(blocks). Grid (ceil(I' / columns), S, slices * P).
//  trellis_down_decode    : 0 h fp32 [rotate.slices, P, S, I'], 1 ids, 2 bias1 [E, 2I (gate, then up) or I], 3 gate
//  biases,
//                           4 gate table, 5 up biases, 6 up table, 7 down codes, 8 down scales, 9 down table, 10 y out
//                           fp32 [slices, S, H'], 11 TrellisDecodeArgs; threadgroup 0: rotated_row_bytes(blocks).
//                           Grid (ceil(H' / columns), S, slices).
struct TrellisDecodeArgs {
  RotateArgs rotate;
  uint slices; // of the inputs, as many as they have blocks of 128 or fewer
};
