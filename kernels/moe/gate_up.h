// What gate_up does on dense and on quantised weights: the order of biases, storing the sums of a row tile, and when
// `down` may start beside it.
#pragma once
#include "../tiles/early_start.h"
#include "gemm.h"

/// w1 rows of gate column n, and of its up column: see ExpertsArgs::interleaved.
inline uint gate_row(uint n, bool interleaved) { return interleaved ? 2 * n : n; }
inline uint up_row(uint n, uint intermediate, bool interleaved) { return interleaved ? 2 * n + 1 : intermediate + n; }

/// For one token: lets `down`, which asks for its weights first, start beside gate_up's threadgroups of `columns` where
/// there are at most `resident` of those.
inline void let_down_start(constant ExpertsArgs& args, uint columns, uint resident) {
  if (args.tokens * (args.top_k + args.shared) * divide_up(args.intermediate, columns) <= resident)
    let_next_kernel_start();
}

/// Where a row tile's sums go: biased, activated, to h.
template <typename T, bool GATED, typename Source>
struct GateUpStore {
  static constexpr constant uint MATRICES = GATED ? 2 : 1;
  Source rows;
  device T* h;          // of the tile's first row
  device const T* bias; // of the expert, or null
  uint count;           // rows of the tile
  uint first_column;
  uint intermediate;
  constant ExpertsArgs& args;

  void operator()(uint row, uint column, thread const float (&sums)[MATRICES][2]) thread const {
    const uint n = first_column + column;
    if (row >= count || n >= intermediate)
      return;
    float gate[2], up[2], value[2];
    UNROLL
    for (uint i = 0; i < 2; ++i) {
      gate[i] = sums[0][i];
      up[i] = GATED ? sums[MATRICES - 1][i] : 0.0f;
      if (bias && n + i < intermediate) {
        gate[i] += float(bias[GATED ? gate_row(n + i, args.interleaved) : n + i]);
        if (GATED)
          up[i] += float(bias[up_row(n + i, intermediate, args.interleaved)]);
      }
    }
    activate(args.activation, gate, up, args.alpha, args.limit, value);
    store_pair(h + ulong(rows.offset(row)) * args.h_row_stride, n, intermediate, true, value[0], value[1]);
  }
};
