// down on quantised weights: y = h Wd^T + bd, in `decode` also the weighted sum over the experts of a token. Shapes and
// families as in down.metal; each expert has a record of its own (docs/formats.md), so formats and bits may differ from
// expert to expert. Bytes to move: those of the codes, scales and biases of the experts chosen.
#include "../tiles/early_start.h"
#include "combine.h"
#include "down.h"
#include "down_share.h"
#include "gemm_quantized.h"
#include "gemv_quantized.h"
#include "packed_product.h"

#ifdef METAL_SIM_CUDA
constexpr constant uint DOWN_MAX_SIMDGROUPS =
    code_is_packed(FIRST_MATRIX, 2)
        ? packed_down(code_group_size(FIRST_MATRIX), code_short_rows(FIRST_MATRIX), THREADGROUP_BYTES).simdgroups
        : DOWN_LANE_SIMDGROUPS;
template <typename T>
constexpr uint down_quantized_decode_least_threadgroups = code_is_packed(FIRST_MATRIX, sizeof(T)) ? 1 : 0;
template <typename T, uint ROW_TILE, uint TILE_N>
constexpr uint down_quantized_gemm_least_threadgroups = packed_least_threadgroups<T, FIRST_MATRIX, ROW_TILE>();
#else
constexpr constant uint DOWN_MAX_SIMDGROUPS = DOWN_LANE_SIMDGROUPS;
#endif
constexpr constant uint DOWN_DECODE_THREADGROUP_COLUMNS = gemv_threadgroup_columns(DOWN_DECODE_COLUMNS, SIMD_WIDTH);

/// total[i] = the part of column + i of out[token] that pieces first .. last - 1 are, in this lane: the K of the
/// token's slots, one after the other, in pieces of SIMDGROUP_RUN_ELEMENTS.
template <uint N, typename T>
inline void down_quantized_pieces(device const T* h, thread const ExpertPart& routed, thread const ExpertPart& shared,
                                  device const T* bias, device const int* ids, device const uchar* weights,
                                  device const uchar* shared_weights, constant ExpertsArgs& args, uint token,
                                  uint column, uint first, uint last, uint lane, thread float (&total)[N][1]) {
  const uint slots = args.top_k + args.shared;
  uint slot_first = 0;
  for (uint slot = 0; slot < slots && slot_first < last; ++slot) {
    const bool is_routed = slot < args.top_k;
    const uint K = is_routed ? args.intermediate : args.shared_intermediate;
    const uint begin = max(first, slot_first) - slot_first;
    const uint end = min(last - slot_first, divide_up(K, SIMDGROUP_RUN_ELEMENTS));
    slot_first += divide_up(K, SIMDGROUP_RUN_ELEMENTS);
    if (begin >= end)
      continue;
    const uint expert = is_routed ? load_id(ids, ulong(token) * args.ids_token_stride + slot * args.ids_slot_stride,
                                            args.id_words, args.experts)
                                  : args.experts + slot - args.top_k;
    if (expert == NO_EXPERT)
      continue;
    const float weight = down_weight(weights, shared_weights, args, token, slot);
    const QuantizedRows<N> w{expert_matrix(routed, shared, expert, args.experts, FIRST_MATRIX), column,
                             args.hidden - 1};
    Rows<T, 1> x;
    x.row[0] = h + (ulong(token) * slots + slot) * args.h_row_stride;
    float sum[N][1];
    dot_quantized(w, x, begin * SIMD_WIDTH, min(end * SIMD_WIDTH, K / RUN_ELEMENTS), lane, sum);
    if (end * SIMD_WIDTH > K / RUN_ELEMENTS) // the last piece
      add_tail(w, x, K, lane, sum);
    const bool biased = is_routed && args.has_bias && begin == 0 && lane == 0;
    UNROLL
    for (uint i = 0; i < N; ++i) {
      const float b = biased && column + i < args.hidden ? float(bias[ulong(expert) * args.hidden + column + i]) : 0.0f;
      total[i][0] = fma(weight, sum[i][0] + b, total[i][0]);
    }
  }
}

/// Asks for the first codes of a simdgroup's share and for the scales of their rows, which need no h: a lane for a row
/// of a slot.
template <uint N>
inline void prefetch_quantized_share(thread const ExpertPart& routed, thread const ExpertPart& shared,
                                     device const int* ids, constant ExpertsArgs& args, uint token, uint column,
                                     uint simdgroup, uint lane) {
  const DownPart part = DownShare<SIMDGROUP_RUN_ELEMENTS>(args, simdgroup).part(args, lane / N);
  const uint row = column + lane % N;
  if (part.begin == part.end || row >= args.hidden)
    return;
  const uint expert = slot_expert(ids, args, token, part.slot);
  if (expert == NO_EXPERT)
    return;
  const QuantizedMatrix matrix = expert_matrix(routed, shared, expert, args.experts, FIRST_MATRIX);
  const uint run_bytes = RUN_ELEMENTS / 8 * matrix.bits;
  const uint bytes = (part.end - part.begin) / RUN_ELEMENTS * run_bytes;
  if (matrix.aligned && bytes >= 16)
    prefetch(matrix.row_codes(row) + part.begin / RUN_ELEMENTS * run_bytes, min(bytes / 16 * 16, DOWN_PREFETCH_BYTES));
  if (matrix.format == FORMAT_DENSE)
    return;
  const uint scales_at = part.begin / RUN_ELEMENTS * matrix.scales_stride / divide_up(part.K, RUN_ELEMENTS); // in a row
  prefetch_line(matrix.row_scales(row) + scales_at);
  if (matrix.format == FORMAT_AFFINE)
    prefetch_line(matrix.row_biases(row) + scales_at);
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(DOWN_MAX_SIMDGROUPS* SIMD_WIDTH)]] void
down_quantized_decode(device const T* h [[buffer(0)]], device const uchar* codes [[buffer(1)]],
                      device const uchar* scales [[buffer(2)]], device const uchar* biases [[buffer(3)]],
                      device const ExpertMatrix* table [[buffer(4)]], device const uchar* shared_codes [[buffer(5)]],
                      device const uchar* shared_scales [[buffer(6)]], device const uchar* shared_biases [[buffer(7)]],
                      device const ExpertMatrix* shared_table [[buffer(8)]], device const T* bias [[buffer(9)]],
                      device const int* ids [[buffer(10)]], device const uchar* weights [[buffer(11)]],
                      device const uchar* shared_weights [[buffer(12)]], device T* out [[buffer(13)]],
                      constant ExpertsArgs& args [[buffer(14)]], threadgroup float* sums [[threadgroup(0)]],
                      uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint N = SIMD_WIDTH == 1 ? quantized_columns<1>() : DOWN_DECODE_COLUMNS;
  const uint first_column = group.x * DOWN_DECODE_THREADGROUP_COLUMNS, token = group.y;
  const ExpertPart routed{codes, scales, biases, table},
      shared{shared_codes, shared_scales, shared_biases, shared_table};
  device T* to = out + ulong(token) * args.out_row_stride;
#ifdef METAL_SIM_CUDA
  if (down_packed_decode<FIRST_MATRIX>(h, routed, shared, bias, ids, weights, shared_weights, to, args, sums, group.x,
                                       token, simdgroup, lane)) // waits itself
    return;
#endif
  if (SIMD_WIDTH > 1)
    prefetch_quantized_share<N>(routed, shared, ids, args, token, first_column, simdgroup, lane);
  wait_for_previous_kernel();
  const DownShare<SIMDGROUP_RUN_ELEMENTS> share(args, simdgroup);
  const uint end = min(first_column + DOWN_DECODE_THREADGROUP_COLUMNS, args.hidden);
  for (uint column = first_column; column < end; column += N) { // once, on a GPU
    float total[N][1] = {};
    down_quantized_pieces(h, routed, shared, bias, ids, weights, shared_weights, args, token, column, share.first,
                          share.last, lane, total);
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

/// Columns column .. column + R - 1 of y, in prefill4.
template <typename T, typename Source>
struct DownQuantizedBlock {
  static constexpr constant uint R = quantized_columns<GEMV_ROWS>();
  Source rows;
  device float* y;      // of the tile's first row
  device const T* bias; // of the expert, or null
  uint count;           // rows
  uint K;
  uint end;
  uint lane;
  thread const QuantizedMatrix& matrix;
  constant ExpertsArgs& args;

  template <uint C>
  void run(uint column, uint first) thread const {
    float sum[R][C];
    const QuantizedRows<R> w{matrix, column, args.hidden - 1};
    dot_quantized_block<T>(w, rows, first, count, K, lane, sum);
    const LaneSums<R * C> sums = sum_lanes<0, R>(sum, lane);
    for (uint e = lane; e < R * C; e += SIMD_WIDTH) {
      const uint n = column + e / C;
      if (n < end && first + e % C < count)
        y[ulong(rows.offset(first + e % C)) * args.out_row_stride + n] = sums.at(e) + (bias ? float(bias[n]) : 0.0f);
    }
  }
};

template <typename T>
[[kernel, max_total_threads_per_threadgroup(GEMV_LANE_SIMDGROUPS* SIMD_WIDTH)]] void down_quantized_prefill4(
    device const T* h [[buffer(0)]], device const uchar* codes [[buffer(1)]], device const uchar* scales [[buffer(2)]],
    device const uchar* biases [[buffer(3)]], device const ExpertMatrix* table [[buffer(4)]],
    device const uchar* shared_codes [[buffer(5)]], device const uchar* shared_scales [[buffer(6)]],
    device const uchar* shared_biases [[buffer(7)]], device const ExpertMatrix* shared_table [[buffer(8)]],
    device const T* bias [[buffer(9)]], device const int* ids [[buffer(10)]],
    device const RowTile* tiles [[buffer(11)]], device float* y [[buffer(12)]],
    constant ExpertsArgs& args [[buffer(13)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const TileRows<PREFILL4_ROW_TILE> tile = tile_rows<PREFILL4_ROW_TILE>(ids, tiles, args, group.x, lane);
  if (tile.count == 0)
    return;
  using Source = PlacedRows<T, PREFILL4_ROW_TILE>;
  using Block = DownQuantizedBlock<T, Source>;
  const bool is_routed = tile.expert < args.experts;
  const ExpertPart routed{codes, scales, biases, table},
      shared{shared_codes, shared_scales, shared_biases, shared_table};
  const QuantizedMatrix matrix = expert_matrix(routed, shared, tile.expert, args.experts, FIRST_MATRIX);
  const uint K = is_routed ? args.intermediate : args.shared_intermediate;
  const Source rows{h + ulong(tile.first) * args.h_row_stride, args.h_row_stride, tile};
  device const T* b = is_routed && args.has_bias ? bias + ulong(tile.expert) * args.hidden : nullptr;
  device float* to = y + ulong(tile.first) * args.out_row_stride;
  const uint first_column = group.y * QUANTIZED_THREADGROUP_COLUMNS;
  const uint end = min(first_column + QUANTIZED_THREADGROUP_COLUMNS, args.hidden);
  const Block block{rows, to, b, tile.count, K, end, lane, matrix, args};
  for (uint column = first_column + simdgroup * Block::R; column < end; column += GEMV_LANE_SIMDGROUPS * Block::R)
    for_quantized_row_runs<GEMV_ROWS>(block, column, tile.count);
}

template <typename T, uint ROW_TILE, uint TILE_N>
[[kernel, max_total_threads_per_threadgroup(GEMM_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
down_quantized_gemm(device const T* h [[buffer(0)]], device const uchar* codes [[buffer(1)]],
                    device const uchar* scales [[buffer(2)]], device const uchar* biases [[buffer(3)]],
                    device const ExpertMatrix* table [[buffer(4)]], device const uchar* shared_codes [[buffer(5)]],
                    device const uchar* shared_scales [[buffer(6)]], device const uchar* shared_biases [[buffer(7)]],
                    device const ExpertMatrix* shared_table [[buffer(8)]], device const T* bias [[buffer(9)]],
                    device const int* ids [[buffer(10)]], device const RowTile* tiles [[buffer(11)]],
                    device float* y [[buffer(12)]], constant ExpertsArgs& args [[buffer(13)]],
                    threadgroup uchar* memory [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint2 place = tile_and_block(FIRST_MATRIX, group);
  const TileRows<ROW_TILE> tile = tile_rows<ROW_TILE>(ids, tiles, args, place.x, lane);
  if (tile.count == 0)
    return;
  using Tile = GemmTile<T, float, 1, ROW_TILE, TILE_N, true>;
  const uint first_column = place.y * tile_columns(FIRST_MATRIX, sizeof(T), ROW_TILE, 1, Tile::COLUMNS);

  QuantizedStager<T, 1, Tile::COLUMNS, Tile::K_TILE, typename Tile::Layout> weights;
  const bool is_routed = tile.expert < args.experts;
  const ExpertPart routed{codes, scales, biases, table},
      shared{shared_codes, shared_scales, shared_biases, shared_table};
  weights.matrices[0] = expert_matrix(routed, shared, tile.expert, args.experts, FIRST_MATRIX);
  weights.first_column = first_column;
  weights.columns = args.hidden;
  weights.thread_index = simdgroup * SIMD_WIDTH + lane;

  const PlacedRows<T, ROW_TILE> rows{h + ulong(tile.first) * args.h_row_stride, args.h_row_stride, tile};
  const uint K = is_routed ? args.intermediate : args.shared_intermediate;
  device const T* b = is_routed && args.has_bias ? bias + ulong(tile.expert) * args.hidden : nullptr;
  const DownStore<T, PlacedRows<T, ROW_TILE>> store{
      rows, y + ulong(tile.first) * args.out_row_stride, b, tile.count, first_column, args.hidden, args.out_row_stride};
#ifdef METAL_SIM_CUDA
  if (multiply_packed_tile<FIRST_MATRIX, T, ROW_TILE, true>(rows, tile.count, weights.matrices, first_column,
                                                            args.hidden, K, store, memory, simdgroup, lane))
    return;
#endif
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tile product;
  product.multiply_decoded(rows, tile.count, weights, K, memory, simdgroup, lane, whole_vectors<T>(K));
  product.for_each_pair(store, memory, simdgroup, lane);
}

#define INSTANTIATE(NAME, ...) template [[host_name(NAME)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// Every family.
#define FAMILIES(T, T_NAME)                                                                                            \
  INSTANTIATE("down_quantized_decode_fp32acc_" T_NAME, down_quantized_decode<T>)                                       \
  INSTANTIATE("down_quantized_prefill4_fp32acc_" T_NAME, down_quantized_prefill4<T>)                                   \
  INSTANTIATE("down_quantized_base_fp32acc_" T_NAME, down_quantized_gemm<T, BASE_ROW_TILE, BASE_TILE_N>)               \
  INSTANTIATE("down_quantized_large_batch_fp32acc_m16_" T_NAME, down_quantized_gemm<T, 16, LARGE_BATCH_TILE_N>)        \
  INSTANTIATE("down_quantized_large_batch_fp32acc_m64_" T_NAME, down_quantized_gemm<T, 64, LARGE_BATCH_TILE_N>)

FAMILIES(float, "fp32")
FAMILIES(half, "fp16")
FAMILIES(bfloat, "bf16")
