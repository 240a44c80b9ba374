// One lane block of the GEMV families (decode, prefill4): R output columns for C rows that share an expert.
#pragma once
#include "../formats/dense.h"
#include "../tiles/dot.h"
#include "../tiles/scalar.h"
#include "activation.h"

constexpr constant uint GEMV_LANE_SIMDGROUPS = simdgroups(GEMV_SIMDGROUPS, SIMD_WIDTH);

/// Output columns that a simdgroup computes at a time. With C rows each column is C accumulators per matrix, and gate
/// and up are two matrices: 4 and 2 keep the decode and prefill4 blocks at 8 and 16 accumulators a lane.
template <uint C> constexpr uint gemv_columns() { return C == 1 ? 4 : 2; }

template <bool VECTORIZED, typename Acc, uint R, uint C, typename T>
inline void dot_columns(thread const Rows<T, R>& w, thread const Rows<T, C>& x, uint K, uint lane,
                        thread float (&sum)[R][C]) {
  dot_rows<VECTORIZED, Acc>(w, x, K, lane, sum);
  for (uint r = 0; r < R; ++r)
    for (uint c = 0; c < C; ++c)
      sum[r][c] = simd_sum(sum[r][c]);
}

/// w1 rows of a gate column n, and of its up column: see ExpertsArgs::interleaved.
inline uint gate_row(uint n, bool interleaved) { return interleaved ? 2 * n : n; }
inline uint up_row(uint n, uint intermediate, bool interleaved) { return interleaved ? 2 * n + 1 : intermediate + n; }

/// h.row[c][n] = act(gate) * up for the columns n of this threadgroup. w1, bias: of one expert; bias may be null.
template <bool VECTORIZED, typename Acc, bool GATED, uint C, typename T>
inline void gate_up_columns(device const T* w1, device const T* bias, thread const Rows<T, C>& x,
                            device T* thread (&h)[C], uint intermediate, uint first_column,
                            constant ExpertsArgs& args, uint simdgroup, uint lane) {
  constexpr uint N = gemv_columns<C>();
  constexpr uint R = GATED ? 2 * N : N;
  const uint end = min(first_column + GEMV_TILE_N, intermediate);
  const uint K = args.hidden;
  for (uint column = first_column + simdgroup * N; column < end; column += GEMV_LANE_SIMDGROUPS * N) {
    Rows<T, R> w;
    for (uint i = 0; i < N; ++i) {
      const uint n = min(column + i, intermediate - 1); // past the edge: the last column again, not written
      w.row[i] = w1 + ulong(GATED ? gate_row(n, args.interleaved) : n) * K;
      if (GATED)
        w.row[N + i] = w1 + ulong(up_row(n, intermediate, args.interleaved)) * K;
    }
    float sum[R][C];
    dot_columns<VECTORIZED, Acc>(w, x, K, lane, sum);
    for (uint i = 0; i < N; ++i) {
      const uint n = column + i;
      for (uint c = 0; c < C; ++c)
        if (n < end && lane == (i * C + c) % SIMD_WIDTH) {
          float gate = sum[i][c];
          float up = GATED ? sum[R - N + i][c] : 0.0f;
          if (args.has_bias && bias) {
            gate += float(bias[GATED ? gate_row(n, args.interleaved) : n]);
            if (GATED)
              up += float(bias[up_row(n, intermediate, args.interleaved)]);
          }
          h[c][n] = T(activate(args.activation, gate, up, args.alpha, args.limit));
        }
    }
  }
}
