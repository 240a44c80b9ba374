// down: y = h Wd^T + bd, the second matrix product of every chosen expert; in `decode` also the weighted sum over the
// experts of a token.
//
//   h [S, I']        from gate_up                          w2 [E, H, I]
//   y [S, H] fp32    grouped families, rows as in h        out [T, H] decode, in h's dtype
//
// decode       A threadgroup computes DOWN_DECODE_COLUMNS columns of one token. The K of the token's slots, one after
//              the other, is what its simdgroups divide evenly, whatever the number of slots and their K: each adds
//              weight * (dot + bias) of its share in slot order, and the shares are added in order, all in fp32. No
//              second pass, no atomics, the same bits in every run.
// prefill4     A threadgroup computes DOWN_PREFILL4_THREADGROUP_COLUMNS columns of one row tile, see gemv.h.
// base, large_batch, simd
//              8x8 simdgroup matrices, see gemm.h. `combine` then adds the rows of each token.
#include "../tiles/early_start.h"
#include "combine.h"
#include "down.h"
#include "down_share.h"
#include "gemv.h"

constexpr constant uint DOWN_DECODE_THREADGROUP_COLUMNS = gemv_threadgroup_columns(DOWN_DECODE_COLUMNS, SIMD_WIDTH);
constexpr constant uint DOWN_PREFILL4_THREADGROUP_COLUMNS =
    gemv_threadgroup_columns(GEMV_SIMDGROUPS * DOWN_PREFILL4_COLUMNS, SIMD_WIDTH);

/// w2 of one expert, routed or shared.
template <typename T>
inline device const T* expert_w2(device const T* w2, device const T* shared_w2, uint expert,
                                 constant ExpertsArgs& args) {
  return dense_expert(w2, shared_w2, expert, args.experts, ulong(args.hidden) * args.intermediate,
                      ulong(args.hidden) * args.shared_intermediate);
}

/// Rows column .. column + R - 1 of one expert's w2; past the edge the last one again, not stored.
template <uint R, typename T>
inline Rows<T, R> down_rows(device const T* w2, uint column, uint hidden, uint K) {
  Rows<T, R> w;
  w.next = ulong(R) * K;
  UNROLL
  for (uint i = 0; i < R; ++i)
    w.row[i] = w2 + ulong(min(column + i, hidden - 1)) * K;
  return w;
}

/// total[i] = the part of column + i of out[token] that pieces first .. last - 1 are, in this lane: the K of the
/// token's slots, one after the other, in pieces of SIMDGROUP_ELEMENTS.
template <bool VECTORIZED, typename Acc, uint N, typename T>
inline void down_decode_pieces(device const T* h, device const T* w2, device const T* shared_w2, device const T* bias,
                               device const int* ids, device const uchar* weights, device const uchar* shared_weights,
                               constant ExpertsArgs& args, uint token, uint column, uint first, uint last, uint lane,
                               thread float (&total)[N][1]) {
  const uint slots = args.top_k + args.shared;
  uint slot_first = 0;
  for (uint slot = 0; slot < slots && slot_first < last; ++slot) {
    const bool routed = slot < args.top_k;
    const uint K = routed ? args.intermediate : args.shared_intermediate;
    const uint begin = max(first, slot_first) - slot_first;
    const uint end = min(last - slot_first, divide_up(K, SIMDGROUP_ELEMENTS));
    slot_first += divide_up(K, SIMDGROUP_ELEMENTS);
    if (begin >= end)
      continue;
    const uint expert = slot_expert(ids, args, token, slot);
    if (expert == NO_EXPERT)
      continue;
    const float weight = down_weight(weights, shared_weights, args, token, slot);
    const uint k = begin * SIMDGROUP_ELEMENTS;
    const Rows<T, N> w = down_rows<N>(expert_w2(w2, shared_w2, expert, args) + k, column, args.hidden, K);
    Rows<T, 1> x;
    x.row[0] = h + (ulong(token) * slots + slot) * args.h_row_stride + k;
    float sum[N][1];
    dot_rows<VECTORIZED, Acc>(w, x, min(end * SIMDGROUP_ELEMENTS, K) - k, lane, sum);
    const bool biased = routed && args.has_bias && begin == 0 && lane == 0;
    UNROLL
    for (uint i = 0; i < N; ++i) {
      const float b = biased && column + i < args.hidden ? float(bias[ulong(expert) * args.hidden + column + i]) : 0.0f;
      total[i][0] = fma(weight, sum[i][0] + b, total[i][0]);
    }
  }
}

/// Asks for the first weights of a simdgroup's share, which need no h: a lane for a row of a slot.
template <uint N, typename T>
inline void prefetch_down_weights(device const T* w2, device const T* shared_w2, device const int* ids,
                                  constant ExpertsArgs& args, uint token, uint column, uint simdgroup, uint lane) {
  const DownPart part = DownShare<SIMDGROUP_ELEMENTS>(args, simdgroup).part(args, lane / N);
  const uint row = column + lane % N;
  if (part.begin == part.end || row >= args.hidden)
    return;
  const uint expert = slot_expert(ids, args, token, part.slot);
  if (expert != NO_EXPERT)
    prefetch(expert_w2(w2, shared_w2, expert, args) + ulong(row) * part.K + part.begin,
             min((part.end - part.begin) * uint(sizeof(T)), DOWN_PREFETCH_BYTES));
}

template <bool VECTORIZED, typename T, typename Acc>
inline void down_decode_columns(device const T* h, device const T* w2, device const T* shared_w2, device const T* bias,
                                device const int* ids, device const uchar* weights, device const uchar* shared_weights,
                                device T* out, constant ExpertsArgs& args, threadgroup float* sums, uint first_column,
                                uint token, uint simdgroup, uint lane) {
  constexpr uint N = SIMD_WIDTH == 1 ? one_lane_weight_rows<1>() : DOWN_DECODE_COLUMNS;
  const DownShare<SIMDGROUP_ELEMENTS> share(args, simdgroup);
  device T* to = out + ulong(token) * args.out_row_stride;
  const uint end = min(first_column + DOWN_DECODE_THREADGROUP_COLUMNS, args.hidden);
  for (uint column = first_column; column < end; column += N) { // once, on a GPU
    float total[N][1] = {};
    down_decode_pieces<VECTORIZED, Acc>(h, w2, shared_w2, bias, ids, weights, shared_weights, args, token, column,
                                        share.first, share.last, lane, total);
    const LaneSums<N> own = sum_lanes<0, N>(total, lane);
    if (DOWN_LANE_SIMDGROUPS == 1) {
      for (uint i = lane; i < N; i += SIMD_WIDTH)
        if (column + i < end)
          to[column + i] = T(own.at(i));
      continue;
    }
    for (uint i = lane; i < N; i += SIMD_WIDTH)
      sums[simdgroup * N + i] = own.at(i);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = simdgroup * SIMD_WIDTH + lane; i < N && column + i < end; i += DOWN_LANE_SIMDGROUPS * SIMD_WIDTH) {
      float sum = sums[i];
      for (uint s = 1; s < DOWN_LANE_SIMDGROUPS; ++s)
        sum += sums[s * N + i];
      to[column + i] = T(sum);
    }
  }
}

template <typename T, typename Acc>
[[kernel, max_total_threads_per_threadgroup(DOWN_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
down_decode(device const T* h [[buffer(0)]], device const T* w2 [[buffer(1)]], device const T* shared_w2 [[buffer(2)]],
            device const T* bias [[buffer(3)]], device const int* ids [[buffer(4)]],
            device const uchar* weights [[buffer(5)]], device const uchar* shared_weights [[buffer(6)]],
            device T* out [[buffer(7)]], constant ExpertsArgs& args [[buffer(8)]],
            threadgroup float* sums [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
            uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint first_column = group.x * DOWN_DECODE_THREADGROUP_COLUMNS;
  if (SIMD_WIDTH > 1 && args.vectorized)
    prefetch_down_weights<DOWN_DECODE_COLUMNS>(w2, shared_w2, ids, args, group.y, first_column, simdgroup, lane);
  wait_for_previous_kernel();
  if (args.vectorized)
    down_decode_columns<true, T, Acc>(h, w2, shared_w2, bias, ids, weights, shared_weights, out, args, sums,
                                      first_column, group.y, simdgroup, lane);
  else
    down_decode_columns<false, T, Acc>(h, w2, shared_w2, bias, ids, weights, shared_weights, out, args, sums,
                                       first_column, group.y, simdgroup, lane);
}

/// Columns column .. column + R - 1 of y, in prefill4.
template <bool VECTORIZED, typename T, typename Acc, typename Source>
struct DownBlock {
  static constexpr constant uint R = gemv_columns<GEMV_ROWS, 1>(DOWN_PREFILL4_COLUMNS);
  Source rows;
  device float* y;      // of the tile's first row
  device const T* bias; // of the expert, or null
  uint K;
  uint stride;
  uint column;
  uint end;
  uint lane;

  template <uint C>
  void run(thread const Rows<T, R>& w, uint first) thread const {
    float sum[R][C];
    dot_block<VECTORIZED, Acc>(w, rows, first, K, lane, sum);
    const LaneSums<R * C> sums = sum_lanes<0, R>(sum, lane);
    for (uint e = lane; e < R * C; e += SIMD_WIDTH) {
      const uint n = column + e / C;
      if (n < end)
        y[ulong(rows.offset(first + e % C)) * stride + n] = sums.at(e) + (bias ? float(bias[n]) : 0.0f);
    }
  }
};

template <bool VECTORIZED, typename T, typename Acc, typename Source>
inline void down_prefill4_columns(thread const Source& rows, uint count, device const T* w, device const T* bias,
                                  device float* y, uint K, uint first_column, constant ExpertsArgs& args,
                                  uint simdgroup, uint lane) {
  using Block = DownBlock<VECTORIZED, T, Acc, Source>;
  const uint end = min(first_column + DOWN_PREFILL4_THREADGROUP_COLUMNS, args.hidden);
  for (uint column = first_column + simdgroup * Block::R; column < end; column += GEMV_LANE_SIMDGROUPS * Block::R) {
    const Block block{rows, y, bias, K, args.out_row_stride, column, end, lane};
    const Rows<T, Block::R> weight_rows = down_rows<Block::R>(w, column, args.hidden, K);
    for_row_runs<GEMV_ROWS>(block, weight_rows, count);
  }
}

template <typename T, typename Acc>
[[kernel, max_total_threads_per_threadgroup(GEMV_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
down_prefill4(device const T* h [[buffer(0)]], device const T* w2 [[buffer(1)]],
              device const T* shared_w2 [[buffer(2)]], device const T* bias [[buffer(3)]],
              device const int* ids [[buffer(4)]], device const RowTile* tiles [[buffer(5)]],
              device float* y [[buffer(6)]], constant ExpertsArgs& args [[buffer(7)]],
              uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
              uint lane [[thread_index_in_simdgroup]]) {
  const TileRows<PREFILL4_ROW_TILE> tile = tile_rows<PREFILL4_ROW_TILE>(ids, tiles, args, group.x, lane);
  if (tile.count == 0)
    return;
  const bool routed = tile.expert < args.experts;
  const uint K = routed ? args.intermediate : args.shared_intermediate;
  device const T* w = expert_w2(w2, shared_w2, tile.expert, args);
  device const T* b = routed && args.has_bias ? bias + ulong(tile.expert) * args.hidden : nullptr;
  const PlacedRows<T, PREFILL4_ROW_TILE> rows{h + ulong(tile.first) * args.h_row_stride, args.h_row_stride, tile};
  device float* to = y + ulong(tile.first) * args.out_row_stride;
  const uint first_column = group.y * DOWN_PREFILL4_THREADGROUP_COLUMNS;
  if (args.vectorized)
    down_prefill4_columns<true, T, Acc>(rows, tile.count, w, b, to, K, first_column, args, simdgroup, lane);
  else
    down_prefill4_columns<false, T, Acc>(rows, tile.count, w, b, to, K, first_column, args, simdgroup, lane);
}

template <typename T, typename Acc, uint ROW_TILE, uint TILE_N, bool STAGE_WEIGHTS>
[[kernel, max_total_threads_per_threadgroup(GEMM_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
down_gemm(device const T* h [[buffer(0)]], device const T* w2 [[buffer(1)]], device const T* shared_w2 [[buffer(2)]],
          device const T* bias [[buffer(3)]], device const int* ids [[buffer(4)]],
          device const RowTile* tiles [[buffer(5)]], device float* y [[buffer(6)]],
          constant ExpertsArgs& args [[buffer(7)]], threadgroup uchar* memory [[threadgroup(0)]],
          uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
          uint lane [[thread_index_in_simdgroup]]) {
  const TileRows<ROW_TILE> tile = tile_rows<ROW_TILE>(ids, tiles, args, group.x, lane);
  if (tile.count == 0)
    return;
  using Tile = GemmTile<T, Acc, 1, ROW_TILE, TILE_N, STAGE_WEIGHTS>;
  const uint first_column = group.y * Tile::COLUMNS;
  const bool routed = tile.expert < args.experts;
  const uint K = routed ? args.intermediate : args.shared_intermediate;

  WeightRows<T> weights;
  weights.base = expert_w2(w2, shared_w2, tile.expert, args);
  weights.column_step = 1;
  weights.matrix_step = 0;
  weights.columns = args.hidden;

  const PlacedRows<T, ROW_TILE> rows{h + ulong(tile.first) * args.h_row_stride, args.h_row_stride, tile};
  Tile product;
  product.multiply(rows, tile.count, weights, first_column, K, args.vectorized, memory, simdgroup, lane);

  device const T* b = routed && args.has_bias ? bias + ulong(tile.expert) * args.hidden : nullptr;
  const DownStore<T, PlacedRows<T, ROW_TILE>> store{
      rows, y + ulong(tile.first) * args.out_row_stride, b, tile.count, first_column, args.hidden, args.out_row_stride};
  product.for_each_pair(store, memory, simdgroup, lane);
}

#define INSTANTIATE(NAME, ...) template [[host_name(NAME)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// Every family. ACC_NAME: "_fp32acc" or nothing for fp16 accumulation.
#define FAMILIES(T, T_NAME, ACC, ACC_NAME)                                                                             \
  INSTANTIATE("down_decode" ACC_NAME "_" T_NAME, down_decode<T, ACC>)                                                  \
  INSTANTIATE("down_prefill4" ACC_NAME "_" T_NAME, down_prefill4<T, ACC>)                                              \
  INSTANTIATE("down_base" ACC_NAME "_" T_NAME, down_gemm<T, ACC, BASE_ROW_TILE, BASE_TILE_N, true>)                    \
  INSTANTIATE("down_large_batch" ACC_NAME "_m16_" T_NAME, down_gemm<T, ACC, 16, LARGE_BATCH_TILE_N, true>)             \
  INSTANTIATE("down_large_batch" ACC_NAME "_m32_" T_NAME, down_gemm<T, ACC, 4 * 8, LARGE_BATCH_TILE_N, true>)          \
  INSTANTIATE("down_large_batch" ACC_NAME "_m64_" T_NAME, down_gemm<T, ACC, 64, LARGE_BATCH_TILE_N, true>)             \
  INSTANTIATE("down_large_batch" ACC_NAME "_m128_" T_NAME, down_gemm<T, ACC, 128, LARGE_BATCH_TILE_N, true>)           \
  INSTANTIATE("down_simd" ACC_NAME "_m8_" T_NAME, down_gemm<T, ACC, 8, SIMD_TILE_N, false>)                            \
  INSTANTIATE("down_simd" ACC_NAME "_m16_" T_NAME, down_gemm<T, ACC, 16, SIMD_TILE_N, false>)                          \
  INSTANTIATE("down_simd" ACC_NAME "_m32_" T_NAME, down_gemm<T, ACC, 4 * 8, SIMD_TILE_N, false>)

FAMILIES(float, "fp32", float, "_fp32acc")
FAMILIES(half, "fp16", float, "_fp32acc")
FAMILIES(half, "fp16", half, "")
FAMILIES(bfloat, "bf16", float, "_fp32acc")
