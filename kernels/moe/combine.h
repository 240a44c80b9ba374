// Arguments of `combine`: weighted sum of the rows of each token's experts, in slot order.
#pragma once
#include "../tiles/scalar.h"

/// Simdgroups of a threadgroup: few, so that one token has several threadgroups.
SHARED_CONSTANT uint COMBINE_SIMDGROUPS = 2;
/// Output columns of one thread, consecutive: one 16-byte load of each row.
SHARED_CONSTANT uint COMBINE_COLUMNS = 4;

// Buffers: 0 rows fp32 [S, hidden] in sorted order, 1 inverse [S], 2 topk_weights, 3 shared_weights (any buffer where
// has_shared_weights is 0: they are 1), 4 out [T, hidden], 5 CombineArgs. Grid: (column blocks, tokens).
// A column block is COMBINE_SIMDGROUPS * SIMD_WIDTH * COMBINE_COLUMNS columns (one-thread simdgroups: the whole row).
struct CombineArgs {
  uint tokens;
  uint hidden;
  uint top_k;
  uint shared;
  uint weights_token_stride; // elements
  uint weights_slot_stride;
  uint weights_type; // ScalarType
  uint has_shared_weights;
  uint shared_token_stride;
  uint shared_slot_stride;
  uint shared_type;    // ScalarType
  uint out_row_stride; // elements
  uint vectorized;     // 1: hidden is a multiple of COMBINE_COLUMNS, and rows of `out` start at 4 elements' alignment
};
