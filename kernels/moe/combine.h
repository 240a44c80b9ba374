// Arguments of `combine`: weighted sum of the rows of each token's experts, in slot order.
#pragma once
#include "../tiles/scalar.h"

/// Simdgroups of a threadgroup: few, so that one token has several threadgroups.
SHARED_CONSTANT uint COMBINE_SIMDGROUPS = 2;
/// Output columns of one thread, consecutive: one 16-byte load of each row.
SHARED_CONSTANT uint COMBINE_COLUMNS = 4;

// Buffers: 0 rows fp32 [S, hidden], 1 inverse [S], 2 ids, 3 topk_weights, 4 shared_weights (any buffer where
// has_shared_weights is 0: they are 1), 5 out [T, hidden], 6 CombineArgs. Grid: (column blocks, tokens). Rows are in
// sorted order, or with rows_by_assignment in order of assignments: of inverse and ids one is read, the other is any.
// A column block is COMBINE_SIMDGROUPS * SIMD_WIDTH * COMBINE_COLUMNS columns (one-thread simdgroups: the whole row).
struct CombineArgs {
  uint tokens;
  uint hidden;
  uint experts; // E
  uint top_k;
  uint shared;
  uint rows_by_assignment; // 1: row a is that of assignment a, and there is none where the id is no expert's
  uint ids_token_stride;   // elements of the id type
  uint ids_slot_stride;
  uint id_words;             // 32-bit words of an id: 1 int32, 2 int64
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
