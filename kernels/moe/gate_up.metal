// gate_up: h = act(x Wg^T + bg) * (x Wu^T + bu), the first matrix product of every chosen expert.
//
//   x  [T, H]        hidden states, row stride free        w1 [E, 2I, H]  gate and up rows (E, I, H without a gate)
//   h  [S, I']       intermediate, in x's dtype            I' = h_row_stride; S = T * (top_k + shared)
//
// decode       h rows are assignments (token, slot). A threadgroup computes GEMV_TILE_N columns of one assignment; a
//              simdgroup 4 columns at a time, its lanes splitting K. Every assignment reads its expert: S * 2IH weights.
// prefill4     h rows are in expert order. A threadgroup computes GEMV_TILE_N columns of one row tile of up to 4 rows,
//              which share each weight read.
// base, large_batch, simd
//              h rows are in expert order; 8x8 simdgroup matrices, see gemm.h.
// Grouped families read each selected expert once per row tile: once, where no expert has more rows than a tile.
#include "gemm.h"
#include "gemv.h"

template <bool VECTORIZED, typename T, typename Acc, bool GATED>
inline void gate_up_decode_body(device const T* x, device const T* w1, device const T* shared_w1, device const T* bias,
                                device const int* ids, device T* h, constant ExpertsArgs& args, uint3 group,
                                uint simdgroup, uint lane) {
  const uint slot = group.y, token = group.z;
  const uint slots = args.top_k + args.shared;
  const uint expert = slot < args.top_k ? load_id(ids, ulong(token) * args.ids_token_stride + slot * args.ids_slot_stride,
                                                  args.id_words, args.experts)
                                        : args.experts + slot - args.top_k;
  if (expert == NO_EXPERT)
    return; // dropped: `down` skips the row too
  const uint intermediate = expert < args.experts ? args.intermediate : args.shared_intermediate;
  const uint rows = GATED ? 2 : 1;
  device const T* w = dense_expert(w1, shared_w1, expert, args.experts, ulong(rows * args.intermediate) * args.hidden,
                                   ulong(rows * args.shared_intermediate) * args.hidden);
  device const T* b = expert < args.experts ? bias + ulong(expert) * rows * args.intermediate : nullptr;
  Rows<T, 1> from;
  from.row[0] = x + ulong(token) * args.x_row_stride;
  device T* to[1] = {h + (ulong(token) * slots + slot) * args.h_row_stride};
  gate_up_columns<VECTORIZED, Acc, GATED>(w, b, from, to, intermediate, group.x * GEMV_TILE_N, args, simdgroup, lane);
}

template <typename T, typename Acc, bool GATED>
[[kernel, max_total_threads_per_threadgroup(GEMV_LANE_SIMDGROUPS * SIMD_WIDTH)]] void
gate_up_decode(device const T* x [[buffer(0)]], device const T* w1 [[buffer(1)]], device const T* shared_w1 [[buffer(2)]],
               device const T* bias [[buffer(3)]], device const int* ids [[buffer(4)]], device T* h [[buffer(5)]],
               constant ExpertsArgs& args [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
               uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  if (args.vectorized)
    gate_up_decode_body<true, T, Acc, GATED>(x, w1, shared_w1, bias, ids, h, args, group, simdgroup, lane);
  else
    gate_up_decode_body<false, T, Acc, GATED>(x, w1, shared_w1, bias, ids, h, args, group, simdgroup, lane);
}

/// C = rows of the tile.
template <bool VECTORIZED, uint C, typename T, typename Acc, bool GATED>
inline void gate_up_prefill4_body(device const T* x, device const T* w1, device const T* bias,
                                  device const uint* sorted_rows, device T* h, RowTile tile, uint intermediate,
                                  uint first_column, constant ExpertsArgs& args, uint simdgroup, uint lane) {
  const uint slots = args.top_k + args.shared;
  Rows<T, C> from;
  device T* to[C];
  for (uint c = 0; c < C; ++c) {
    from.row[c] = x + ulong(sorted_rows[tile.first_row + c] / slots) * args.x_row_stride;
    to[c] = h + ulong(tile.first_row + c) * args.h_row_stride;
  }
  gate_up_columns<VECTORIZED, Acc, GATED>(w1, bias, from, to, intermediate, first_column, args, simdgroup, lane);
}

template <bool VECTORIZED, typename T, typename Acc, bool GATED>
inline void gate_up_prefill4_rows(device const T* x, device const T* w, device const T* b, device const uint* sorted_rows,
                                  device T* h, RowTile tile, uint intermediate, uint first_column,
                                  constant ExpertsArgs& args, uint simdgroup, uint lane) {
  switch (tile.rows) {
  case 1:
    return gate_up_prefill4_body<VECTORIZED, 1, T, Acc, GATED>(x, w, b, sorted_rows, h, tile, intermediate,
                                                               first_column, args, simdgroup, lane);
  case 2:
    return gate_up_prefill4_body<VECTORIZED, 2, T, Acc, GATED>(x, w, b, sorted_rows, h, tile, intermediate,
                                                               first_column, args, simdgroup, lane);
  case 3:
    return gate_up_prefill4_body<VECTORIZED, 3, T, Acc, GATED>(x, w, b, sorted_rows, h, tile, intermediate,
                                                               first_column, args, simdgroup, lane);
  default:
    return gate_up_prefill4_body<VECTORIZED, 4, T, Acc, GATED>(x, w, b, sorted_rows, h, tile, intermediate,
                                                               first_column, args, simdgroup, lane);
  }
}

template <typename T, typename Acc, bool GATED>
[[kernel, max_total_threads_per_threadgroup(GEMV_LANE_SIMDGROUPS * SIMD_WIDTH)]] void
gate_up_prefill4(device const T* x [[buffer(0)]], device const T* w1 [[buffer(1)]],
                 device const T* shared_w1 [[buffer(2)]], device const T* bias [[buffer(3)]],
                 device const uint* sorted_rows [[buffer(4)]], device const RowTile* tiles [[buffer(5)]],
                 device T* h [[buffer(6)]], constant ExpertsArgs& args [[buffer(7)]],
                 uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                 uint lane [[thread_index_in_simdgroup]]) {
  const RowTile tile = tiles[group.x];
  const uint first_column = group.y * GEMV_TILE_N;
  const uint intermediate = tile.expert < args.experts ? args.intermediate : args.shared_intermediate;
  if (tile.rows == 0 || first_column >= intermediate)
    return;
  const uint rows = GATED ? 2 : 1;
  device const T* w = dense_expert(w1, shared_w1, tile.expert, args.experts,
                                   ulong(rows * args.intermediate) * args.hidden,
                                   ulong(rows * args.shared_intermediate) * args.hidden);
  device const T* b = tile.expert < args.experts ? bias + ulong(tile.expert) * rows * args.intermediate : nullptr;
  if (args.vectorized)
    gate_up_prefill4_rows<true, T, Acc, GATED>(x, w, b, sorted_rows, h, tile, intermediate, first_column, args,
                                               simdgroup, lane);
  else
    gate_up_prefill4_rows<false, T, Acc, GATED>(x, w, b, sorted_rows, h, tile, intermediate, first_column, args,
                                                simdgroup, lane);
}

template <typename T, typename Acc, bool GATED, uint ROW_TILE, uint TILE_N, uint K_BYTES, bool STAGE_WEIGHTS>
[[kernel, max_total_threads_per_threadgroup(GEMM_LANE_SIMDGROUPS * SIMD_WIDTH)]] void
gate_up_gemm(device const T* x [[buffer(0)]], device const T* w1 [[buffer(1)]], device const T* shared_w1 [[buffer(2)]],
             device const T* bias [[buffer(3)]], device const uint* sorted_rows [[buffer(4)]],
             device const RowTile* tiles [[buffer(5)]], device T* h [[buffer(6)]],
             constant ExpertsArgs& args [[buffer(7)]], threadgroup uchar* memory [[threadgroup(0)]],
             uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
             uint lane [[thread_index_in_simdgroup]]) {
  const RowTile tile = tiles[group.x];
  const uint first_column = group.y * TILE_N;
  const uint intermediate = tile.expert < args.experts ? args.intermediate : args.shared_intermediate;
  if (tile.rows == 0 || first_column >= intermediate)
    return;
  constexpr uint MATRICES = GATED ? 2 : 1;
  using Tile = GemmTile<T, Acc, MATRICES, ROW_TILE, TILE_N, K_BYTES, STAGE_WEIGHTS>;

  WeightRows<T> weights;
  weights.base = dense_expert(w1, shared_w1, tile.expert, args.experts,
                              ulong(MATRICES * args.intermediate) * args.hidden,
                              ulong(MATRICES * args.shared_intermediate) * args.hidden);
  weights.column_step = GATED && args.interleaved ? 2 : 1;
  weights.matrix_step = args.interleaved ? 1 : intermediate;
  weights.columns = intermediate;

  GatheredRows<T> rows{x, sorted_rows + tile.first_row, args.top_k + args.shared, args.x_row_stride};
  Tile product;
  product.multiply(rows, tile.rows, weights, first_column, args.hidden, args.vectorized, memory, simdgroup, lane);

  const bool biased = args.has_bias && tile.expert < args.experts;
  device const T* b = bias + ulong(tile.expert) * MATRICES * args.intermediate;
  threadgroup float* gate = Tile::fragment_memory(memory, simdgroup);
  threadgroup float* up = gate + 64;
  for (uint i = 0; i < Tile::FRAGMENTS; ++i) {
    const uint row = Tile::fragment_row(i, simdgroup);
    const uint column = first_column + Tile::fragment_column(i, simdgroup);
    if (row >= tile.rows || column >= intermediate)
      continue;
    simdgroup_store(product.fragment(i, 0), gate, 8);
    if (GATED)
      simdgroup_store(product.fragment(i, MATRICES - 1), up, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const uint columns = min(8u, intermediate - column);
    // From here a lane touches the same elements in each step, so no barrier stands between them.
    if (biased)
      for (uint e = lane; e < 64; e += SIMD_WIDTH) {
        const uint n = column + min(e % 8, columns - 1);
        gate[e] += float(b[GATED ? gate_row(n, args.interleaved) : n]);
        if (GATED)
          up[e] += float(b[up_row(n, intermediate, args.interleaved)]);
      }
    activate_fragment(args.activation, gate, up, args.alpha, args.limit, lane);
    const uint count = min(8u, tile.rows - row);
    device T* to = h + ulong(tile.first_row + row) * args.h_row_stride + column;
    store_fragment(gate, to, args.h_row_stride, count, columns, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

#define INSTANTIATE(NAME, ...) template [[host_name(NAME)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// One stage in every family. ACC_NAME: "_fp32acc" or nothing for fp16 accumulation.
#define FAMILIES(STAGE, GATED, T, T_NAME, ACC, ACC_NAME)                                                               \
  INSTANTIATE(STAGE "_decode" ACC_NAME "_" T_NAME, gate_up_decode<T, ACC, GATED>)                                      \
  INSTANTIATE(STAGE "_prefill4" ACC_NAME "_" T_NAME, gate_up_prefill4<T, ACC, GATED>)                                  \
  INSTANTIATE(STAGE "_base" ACC_NAME "_" T_NAME,                                                                       \
              gate_up_gemm<T, ACC, GATED, BASE_ROW_TILE, BASE_TILE_N, BASE_K_BYTES, true>)                             \
  INSTANTIATE(STAGE "_large_batch" ACC_NAME "_m16_" T_NAME,                                                            \
              gate_up_gemm<T, ACC, GATED, 16, LARGE_BATCH_TILE_N, LARGE_BATCH_K_BYTES, true>)                          \
  INSTANTIATE(STAGE "_large_batch" ACC_NAME "_m32_" T_NAME,                                                            \
              gate_up_gemm<T, ACC, GATED, 4 * 8, LARGE_BATCH_TILE_N, LARGE_BATCH_K_BYTES, true>)                       \
  INSTANTIATE(STAGE "_simd" ACC_NAME "_m8_" T_NAME, gate_up_gemm<T, ACC, GATED, 8, SIMD_TILE_N, SIMD_K_BYTES, false>)  \
  INSTANTIATE(STAGE "_simd" ACC_NAME "_m16_" T_NAME,                                                                   \
              gate_up_gemm<T, ACC, GATED, 16, SIMD_TILE_N, SIMD_K_BYTES, false>)                                       \
  INSTANTIATE(STAGE "_simd" ACC_NAME "_m32_" T_NAME,                                                                   \
              gate_up_gemm<T, ACC, GATED, 4 * 8, SIMD_TILE_N, SIMD_K_BYTES, false>)

#define DTYPES(STAGE, GATED)                                                                                           \
  FAMILIES(STAGE, GATED, float, "fp32", float, "_fp32acc")                                                             \
  FAMILIES(STAGE, GATED, half, "fp16", float, "_fp32acc")                                                              \
  FAMILIES(STAGE, GATED, half, "fp16", half, "")                                                                       \
  FAMILIES(STAGE, GATED, bfloat, "bf16", float, "_fp32acc")

DTYPES("gate_up", true)
DTYPES("up", false)
