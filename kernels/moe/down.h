// What down does on dense and on quantised weights: routing weights, and storing the sums of a row tile.
#pragma once
#include "../tiles/scalar.h"
#include "gemm.h"

/// What `slot` of `token` adds with: its routing weight, 1 for a shared expert without one.
inline float down_weight(device const uchar* weights, device const uchar* shared_weights, constant ExpertsArgs& args,
                         uint token, uint slot) {
  if (slot < args.top_k)
    return load_scalar(weights, ulong(token) * args.weights_token_stride + ulong(slot) * args.weights_slot_stride,
                       args.weights_type);
  if (args.has_shared_weights == 0)
    return 1.0f;
  return load_scalar(shared_weights,
                     ulong(token) * args.shared_token_stride + ulong(slot - args.top_k) * args.shared_slot_stride,
                     args.shared_type);
}

/// Where a row tile's sums go: biased, to y.
template <typename T, typename Source>
struct DownStore {
  Source rows;
  device float* y;      // of the tile's first row
  device const T* bias; // of the expert, or null
  uint count;           // rows of the tile
  uint first_column;
  uint columns;
  uint stride;

  void operator()(uint row, uint column, thread const float (&sums)[1][2]) thread const {
    const uint n = first_column + column;
    if (row >= count || n >= columns)
      return;
    float value[2];
    UNROLL
    for (uint i = 0; i < 2; ++i)
      value[i] = sums[0][i] + (bias && n + i < columns ? float(bias[n + i]) : 0.0f);
    store_pair(y + ulong(rows.offset(row)) * stride, n, columns, stride % 2 == 0, value[0], value[1]);
  }
};
