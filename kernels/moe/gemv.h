// The GEMV families (decode, prefill4): blocks of weight rows, dotted with the rows that share an expert.
//
// A simdgroup takes a block of output columns at a time and goes through the rows of its tile with it, up to
// GEMV_ROWS together: those share each weight in registers, and the next ones find the block in the nearest cache. So
// the weights of a tile come from memory once, however many rows it has.
#pragma once
#include "../formats/dense.h"
#include "../tiles/dot.h"
#include "../tiles/lane_sums.h"
#include "../tiles/scalar.h"
#include "activation.h"
#include "row_source.h"

constexpr constant uint GEMV_LANE_SIMDGROUPS = simdgroups(GEMV_SIMDGROUPS, SIMD_WIDTH);
/// Rows that share a weight in registers.
constexpr constant uint GEMV_ROWS = 4;
/// Weight rows of a one-thread simdgroup's block: with GEMV_ROWS rows 16 vectors of sums. A single row affords the
/// double.
template <uint MAX_ROWS>
constexpr uint one_lane_weight_rows() {
  return MAX_ROWS == 1 ? 8 : 4;
}
/// Columns of a block of which each takes MATRICES weight rows; `wanted` on a GPU.
template <uint MAX_ROWS, uint MATRICES>
constexpr uint gemv_columns(uint wanted) {
  return SIMD_WIDTH == 1 ? one_lane_weight_rows<MAX_ROWS>() / MATRICES : wanted;
}

/// sum[r][c] = this lane's part of w.row[r] . (row first + c of `rows`).
template <bool VECTORIZED, typename Acc, uint R, uint C, typename T, typename Source>
inline void dot_block(thread const Rows<T, R>& w, thread const Source& rows, uint first, uint K, uint lane,
                      thread float (&sum)[R][C]) {
  Rows<T, C> x;
  UNROLL
  for (uint c = 0; c < C; ++c)
    x.row[c] = rows.at(first + c);
  dot_rows<VECTORIZED, Acc>(w, x, K, lane, sum);
}

/// Runs `block` over `count` rows, up to MAX_ROWS (1, or GEMV_ROWS) of them together.
template <uint MAX_ROWS, typename Block, typename W>
inline void for_row_runs(thread const Block& block, thread const W& w, uint count) {
  for (uint first = 0; first < count; first += MAX_ROWS)
    switch (min(MAX_ROWS, count - first)) {
    case 1:
      block.template run<1>(w, first);
      break;
    case 2:
      block.template run < MAX_ROWS<2 ? MAX_ROWS : 2>(w, first);
      break;
    case 3:
      block.template run < MAX_ROWS<3 ? MAX_ROWS : 3>(w, first);
      break;
    default:
      block.template run<MAX_ROWS>(w, first);
    }
}
