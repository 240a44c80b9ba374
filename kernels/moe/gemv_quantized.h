// The GEMV families on quantised weights: dot products of decoded rows, see gemv.h for who computes what.
//
// A lane takes a run of RUN_ELEMENTS elements of K at a time, the lanes of a simdgroup side by side: 16 bytes of codes
// at 4 bits. Scales are applied to the sum over a run, not to each of its weights. Runs of the next step are loaded
// before those of this one are used.
#pragma once
#include "../formats/decoders.h"
#include "../formats/tail.h"
#include "gemv.h"

constexpr constant uint QUANTIZED_THREADGROUP_COLUMNS =
    gemv_threadgroup_columns(GEMV_SIMDGROUPS * QUANTIZED_COLUMNS, SIMD_WIDTH);
/// Columns of a block. For one row a one-thread simdgroup has something to prepare, once for all of them.
template <uint MAX_ROWS>
constexpr uint quantized_columns() {
  return SIMD_WIDTH == 1 && MAX_ROWS == 1 ? GEMV_TILE_N : gemv_columns<MAX_ROWS, 1>(QUANTIZED_COLUMNS);
}
/// Elements of a row that a simdgroup takes at a time.
constexpr constant uint SIMDGROUP_RUN_ELEMENTS = SIMD_WIDTH * RUN_ELEMENTS;

/// Runs `block` over `count` rows. On a GPU one row, or GEMV_ROWS of which some may not be there: every number of rows
/// would be another copy of every decoder.
template <uint MAX_ROWS, typename Block>
METAL_FUNC void for_quantized_row_runs(thread const Block& block, uint column, uint count) {
  if (SIMD_WIDTH == 1) {
    for_row_runs<MAX_ROWS>(block, column, count);
    return;
  }
  if (MAX_ROWS == 1 || count == 1) {
    block.template run<1>(column, 0);
    return;
  }
  for (uint first = 0; first < count; first += MAX_ROWS)
    block.template run<MAX_ROWS>(column, first);
}

/// Rows first, first + 1, ... of a matrix; beyond the last one it again (what they give is not stored).
template <uint R>
struct QuantizedRows {
  QuantizedMatrix matrix;
  uint first;
  uint last;

  uint row(uint r) thread const { return min(first + r, last); }
};

/// sum[r][c] = this lane's part of weight row r . row c of x, over runs begin .. end - 1 of K.
template <uint R, uint C, typename T>
struct QuantizedDot {
  thread const QuantizedRows<R>& w;
  thread const Rows<T, C>& x;
  uint begin;
  uint end;
  uint lane;
  thread float (&sum)[R][C];

  template <typename Run>
  void run() thread const {
#ifdef METAL_SIM_NATIVE
    metal_sim::dot_quantized<Run>(w, x.row, begin, end, sum);
#else
    UNROLL
    for (uint r = 0; r < R; ++r) {
      UNROLL
      for (uint c = 0; c < C; ++c)
        sum[r][c] = 0.0f;
    }
    uint k = begin + lane;
    if (k >= end)
      return;
    Run runs[R];
    load(k, runs);
    while (true) { // the products stand here once: they are most of the kernel
      const uint next_k = k + SIMD_WIDTH;
      Run next[R];
      if (next_k < end)
        load(next_k, next);
      add_products(runs, k);
      if (next_k >= end)
        return;
      UNROLL
      for (uint r = 0; r < R; ++r)
        runs[r] = next[r];
      k = next_k;
    }
#endif
  }

#ifndef METAL_SIM_NATIVE
private:
  template <typename Run>
  void load(uint k, thread Run (&runs)[R]) thread const {
    UNROLL
    for (uint r = 0; r < R; ++r)
      runs[r].load(w.matrix, w.row(r), k);
  }

  template <typename Run>
  void add_products(thread const Run (&runs)[R], uint k) thread const {
    float part[R][C] = {}, total[C] = {};
    UNROLL
    for (uint first = 0; first < RUN_ELEMENTS; first += LANE_ELEMENTS) {
      LaneRun<T> xs[C];
      UNROLL
      for (uint c = 0; c < C; ++c)
        load_run<true, false>(x.row[c] + k * RUN_ELEMENTS + first, xs[c]);
      UNROLL
      for (uint i = 0; i < LANE_ELEMENTS; ++i) {
        UNROLL
        for (uint c = 0; c < C; ++c)
          total[c] += xs[c].element(i);
        UNROLL
        for (uint r = 0; r < R; ++r) {
          const float element = runs[r].element(first + i);
          UNROLL
          for (uint c = 0; c < C; ++c)
            part[r][c] = fma(element, xs[c].element(i), part[r][c]);
        }
      }
    }
    UNROLL
    for (uint r = 0; r < R; ++r) {
      UNROLL
      for (uint c = 0; c < C; ++c)
        sum[r][c] = runs[r].add(sum[r][c], part[r][c], total[c]);
    }
  }
#endif
};

template <uint R, uint C, typename T>
METAL_FUNC void dot_quantized(thread const QuantizedRows<R>& w, thread const Rows<T, C>& x, uint begin, uint end,
                              uint lane, thread float (&sum)[R][C]) {
  const QuantizedDot<R, C, T> dot{w, x, begin, end, lane, sum};
  with_decoder(w.matrix, dot);
}

/// Adds this lane's part of the elements that whole runs leave over of K.
template <uint R, uint C, typename T>
inline void add_tail(thread const QuantizedRows<R>& w, thread const Rows<T, C>& x, uint K, uint lane,
                     thread float (&sum)[R][C]) {
  if (!has_tail(w.matrix, K))
    return;
  for (uint k = K / RUN_ELEMENTS * RUN_ELEMENTS + lane; k < K; k += SIMD_WIDTH) {
    UNROLL
    for (uint r = 0; r < R; ++r) {
      const float weight = tail_weight(w.matrix, w.row(r), k);
      UNROLL
      for (uint c = 0; c < C; ++c)
        sum[r][c] = fma(weight, float(x.row[c][k]), sum[r][c]);
    }
  }
}

/// dot_quantized with all of K and rows first, first + 1, ... of `rows`; beyond the last of `count` it again (what they
/// give is not stored).
template <typename T, uint R, uint C, typename Source>
METAL_FUNC void dot_quantized_block(thread const QuantizedRows<R>& w, thread const Source& rows, uint first, uint count,
                                    uint K, uint lane, thread float (&sum)[R][C]) {
  Rows<T, C> x;
  UNROLL
  for (uint c = 0; c < C; ++c)
    x.row[c] = rows.at(min(first + c, count - 1));
  dot_quantized(w, x, 0, K / RUN_ELEMENTS, lane, sum);
  add_tail(w, x, K, lane, sum);
}
