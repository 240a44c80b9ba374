// gate_up: h = act(x Wg^T + bg) * (x Wu^T + bu), the first matrix product of every chosen expert.
//
//   x  [T, H]        hidden states, row stride free        w1 [E, 2I, H]  gate and up rows (E, I, H without a gate)
//   h  [S, I']       intermediate, in x's dtype            I' = h_row_stride; S = T * (top_k + shared)
//
// decode       h rows are assignments (token, slot). A threadgroup computes GATE_UP_THREADGROUP_COLUMNS columns of one
//              assignment, a simdgroup GATE_UP_COLUMNS of them, its lanes splitting K. Every assignment reads its
//              expert: S * 2IH weights.
// prefill4     A threadgroup computes as many columns of one row tile, see gemv.h: up to 4 rows share each weight in
//              registers, all rows of the tile each weight read from memory.
// base, large_batch, simd
//              8x8 simdgroup matrices, see gemm.h.
// In grouped families a threadgroup has a tile of rows of one expert, see tile_rows.h, also for where they stand in h.
// They read each selected expert once per row tile: once, where no expert has more rows than a tile.
#include "gate_up.h"
#include "gemv.h"

constexpr constant uint GATE_UP_THREADGROUP_COLUMNS =
    gemv_threadgroup_columns(GEMV_SIMDGROUPS * GATE_UP_COLUMNS, SIMD_WIDTH);

/// w1 of one expert, routed or shared.
template <uint MATRICES, typename T>
inline device const T* expert_w1(device const T* w1, device const T* shared_w1, uint expert,
                                 constant ExpertsArgs& args) {
  return dense_expert(w1, shared_w1, expert, args.experts, ulong(MATRICES * args.intermediate) * args.hidden,
                      ulong(MATRICES * args.shared_intermediate) * args.hidden);
}

/// Columns column .. column + N - 1 of h, in the GEMV families.
template <bool VECTORIZED, uint MAX_ROWS, typename T, typename Acc, bool GATED, typename Source>
struct GateUpBlock {
  static constexpr constant uint N = gemv_columns<MAX_ROWS, GATED ? 2 : 1>(GATE_UP_COLUMNS);
  static constexpr constant uint R = GATED ? 2 * N : N; // weight rows
  Source rows;
  device T* h;          // of the tile's first row
  device const T* bias; // of the expert, or null
  uint intermediate;
  uint column;
  uint end;
  uint lane;
  constant ExpertsArgs& args;

  Rows<T, R> weights(device const T* w1) thread const {
    Rows<T, R> w;
    w.next = ulong(N) * (args.interleaved ? 2 : 1) * args.hidden;
    UNROLL
    for (uint i = 0; i < N; ++i) {
      const uint n = min(column + i, intermediate - 1); // past the edge: the last column again, not stored
      w.row[i] = w1 + ulong(GATED ? gate_row(n, args.interleaved) : n) * args.hidden;
      if (GATED)
        w.row[R - N + i] = w1 + ulong(up_row(n, intermediate, args.interleaved)) * args.hidden;
    }
    return w;
  }

  template <uint C>
  void run(thread const Rows<T, R>& w, uint first) thread const {
    float sum[R][C];
    dot_block<VECTORIZED, Acc>(w, rows, first, args.hidden, lane, sum);
    const LaneSums<N * C> gates = sum_lanes<0, N>(sum, lane);
    const LaneSums<N * C> ups = sum_lanes<R - N, N>(sum, lane);
    for (uint e = lane; e < N * C; e += SIMD_WIDTH) {
      const uint n = column + e / C;
      if (n >= end)
        continue;
      float gate = gates.at(e), up = ups.at(e); // without a gate the same, and `up` is not used
      if (bias) {
        gate += float(bias[GATED ? gate_row(n, args.interleaved) : n]);
        if (GATED)
          up += float(bias[up_row(n, intermediate, args.interleaved)]);
      }
      h[ulong(rows.offset(first + e % C)) * args.h_row_stride + n] =
          T(activate(args.activation, gate, up, args.alpha, args.limit));
    }
  }
};

/// The columns of one threadgroup for `count` rows of one expert.
template <bool VECTORIZED, uint MAX_ROWS, typename T, typename Acc, bool GATED, typename Source>
inline void gate_up_gemv(thread const Source& rows, uint count, device const T* w1, device const T* shared_w1,
                         device const T* bias, uint expert, device T* h, uint first_column, constant ExpertsArgs& args,
                         uint simdgroup, uint lane) {
  constexpr uint MATRICES = GATED ? 2 : 1;
  const uint intermediate = expert < args.experts ? args.intermediate : args.shared_intermediate;
  device const T* w = expert_w1<MATRICES>(w1, shared_w1, expert, args);
  device const T* b =
      args.has_bias && expert < args.experts ? bias + ulong(expert) * MATRICES * args.intermediate : nullptr;
  const uint end = min(first_column + GATE_UP_THREADGROUP_COLUMNS, intermediate);
  using Block = GateUpBlock<VECTORIZED, MAX_ROWS, T, Acc, GATED, Source>;
  for (uint column = first_column + simdgroup * Block::N; column < end; column += GEMV_LANE_SIMDGROUPS * Block::N) {
    const Block block{rows, h, b, intermediate, column, end, lane, args};
    const Rows<T, Block::R> weights = block.weights(w);
    for_row_runs<MAX_ROWS>(block, weights, count);
  }
}

template <typename T, typename Acc, bool GATED>
[[kernel, max_total_threads_per_threadgroup(GEMV_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
gate_up_decode(device const T* x [[buffer(0)]], device const T* w1 [[buffer(1)]],
               device const T* shared_w1 [[buffer(2)]], device const T* bias [[buffer(3)]],
               device const int* ids [[buffer(4)]], device T* h [[buffer(5)]], constant ExpertsArgs& args [[buffer(6)]],
               uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
               uint lane [[thread_index_in_simdgroup]]) {
  let_down_start(args, GATE_UP_THREADGROUP_COLUMNS, GATE_UP_RESIDENT_THREADGROUPS);
  const uint slot = group.y, token = group.z;
  const uint expert = slot_expert(ids, args, token, slot);
  if (expert == NO_EXPERT)
    return; // dropped: `down` skips the row too
  const OneRow<T> rows{x + ulong(token) * args.x_row_stride};
  device T* to = h + (ulong(token) * (args.top_k + args.shared) + slot) * args.h_row_stride;
  if (args.vectorized)
    gate_up_gemv<true, 1, T, Acc, GATED>(rows, 1, w1, shared_w1, bias, expert, to,
                                         group.x * GATE_UP_THREADGROUP_COLUMNS, args, simdgroup, lane);
  else
    gate_up_gemv<false, 1, T, Acc, GATED>(rows, 1, w1, shared_w1, bias, expert, to,
                                          group.x * GATE_UP_THREADGROUP_COLUMNS, args, simdgroup, lane);
}

template <typename T, typename Acc, bool GATED>
[[kernel, max_total_threads_per_threadgroup(GEMV_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
gate_up_prefill4(device const T* x [[buffer(0)]], device const T* w1 [[buffer(1)]],
                 device const T* shared_w1 [[buffer(2)]], device const T* bias [[buffer(3)]],
                 device const int* ids [[buffer(4)]], device const uint* sorted_rows [[buffer(5)]],
                 device const RowTile* tiles [[buffer(6)]], device T* h [[buffer(7)]],
                 constant ExpertsArgs& args [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const TileRows<PREFILL4_ROW_TILE> tile = tile_rows<PREFILL4_ROW_TILE>(ids, tiles, args, group.x, lane);
  if (tile.count == 0)
    return;
  const GatheredRows<T, PREFILL4_ROW_TILE> rows{x, sorted_rows + tile.first, args.top_k + args.shared,
                                                args.x_row_stride, tile};
  device T* to = h + ulong(tile.first) * args.h_row_stride;
  if (args.vectorized)
    gate_up_gemv<true, GEMV_ROWS, T, Acc, GATED>(rows, tile.count, w1, shared_w1, bias, tile.expert, to,
                                                 group.y * GATE_UP_THREADGROUP_COLUMNS, args, simdgroup, lane);
  else
    gate_up_gemv<false, GEMV_ROWS, T, Acc, GATED>(rows, tile.count, w1, shared_w1, bias, tile.expert, to,
                                                  group.y * GATE_UP_THREADGROUP_COLUMNS, args, simdgroup, lane);
}

template <typename T, typename Acc, bool GATED, uint ROW_TILE, uint TILE_N, bool STAGE_WEIGHTS>
[[kernel, max_total_threads_per_threadgroup(GEMM_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
gate_up_gemm(device const T* x [[buffer(0)]], device const T* w1 [[buffer(1)]], device const T* shared_w1 [[buffer(2)]],
             device const T* bias [[buffer(3)]], device const int* ids [[buffer(4)]],
             device const uint* sorted_rows [[buffer(5)]], device const RowTile* tiles [[buffer(6)]],
             device T* h [[buffer(7)]], constant ExpertsArgs& args [[buffer(8)]],
             threadgroup uchar* memory [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
             uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint MATRICES = GATED ? 2 : 1;
  using Tile = GemmTile<T, Acc, MATRICES, ROW_TILE, TILE_N, STAGE_WEIGHTS>;
  const TileRows<ROW_TILE> tile = tile_rows<ROW_TILE>(ids, tiles, args, group.x, lane);
  const uint first_column = group.y * Tile::COLUMNS;
  const bool routed = tile.expert < args.experts;
  const uint intermediate = routed ? args.intermediate : args.shared_intermediate;
  if (tile.count == 0 || first_column >= intermediate)
    return;

  WeightRows<T> weights;
  weights.base = expert_w1<MATRICES>(w1, shared_w1, tile.expert, args);
  weights.column_step = GATED && args.interleaved ? 2 : 1;
  weights.matrix_step = args.interleaved ? 1 : intermediate;
  weights.columns = intermediate;

  const GatheredRows<T, ROW_TILE> rows{x, sorted_rows + tile.first, args.top_k + args.shared, args.x_row_stride, tile};
  Tile product;
  product.multiply(rows, tile.count, weights, first_column, args.hidden, args.vectorized, memory, simdgroup, lane);

  device const T* b = routed && args.has_bias ? bias + ulong(tile.expert) * MATRICES * args.intermediate : nullptr;
  const GateUpStore<T, GATED, GatheredRows<T, ROW_TILE>> store{
      rows, h + ulong(tile.first) * args.h_row_stride, b, tile.count, first_column, intermediate, args};
  product.for_each_pair(store, memory, simdgroup, lane);
}

#define INSTANTIATE(NAME, ...) template [[host_name(NAME)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// One stage in every family. ACC_NAME: "_fp32acc" or nothing for fp16 accumulation.
#define FAMILIES(STAGE, GATED, T, T_NAME, ACC, ACC_NAME)                                                               \
  INSTANTIATE(STAGE "_decode" ACC_NAME "_" T_NAME, gate_up_decode<T, ACC, GATED>)                                      \
  INSTANTIATE(STAGE "_prefill4" ACC_NAME "_" T_NAME, gate_up_prefill4<T, ACC, GATED>)                                  \
  INSTANTIATE(STAGE "_base" ACC_NAME "_" T_NAME, gate_up_gemm<T, ACC, GATED, BASE_ROW_TILE, BASE_TILE_N, true>)        \
  INSTANTIATE(STAGE "_large_batch" ACC_NAME "_m16_" T_NAME, gate_up_gemm<T, ACC, GATED, 16, LARGE_BATCH_TILE_N, true>) \
  INSTANTIATE(STAGE "_large_batch" ACC_NAME "_m32_" T_NAME,                                                            \
              gate_up_gemm<T, ACC, GATED, 4 * 8, LARGE_BATCH_TILE_N, true>)                                            \
  INSTANTIATE(STAGE "_large_batch" ACC_NAME "_m64_" T_NAME, gate_up_gemm<T, ACC, GATED, 64, LARGE_BATCH_TILE_N, true>) \
  INSTANTIATE(STAGE "_large_batch" ACC_NAME "_m128_" T_NAME,                                                           \
              gate_up_gemm<T, ACC, GATED, 128, LARGE_BATCH_TILE_N, true>)                                              \
  INSTANTIATE(STAGE "_simd" ACC_NAME "_m8_" T_NAME, gate_up_gemm<T, ACC, GATED, 8, SIMD_TILE_N, false>)                \
  INSTANTIATE(STAGE "_simd" ACC_NAME "_m16_" T_NAME, gate_up_gemm<T, ACC, GATED, 16, SIMD_TILE_N, false>)              \
  INSTANTIATE(STAGE "_simd" ACC_NAME "_m32_" T_NAME, gate_up_gemm<T, ACC, GATED, 4 * 8, SIMD_TILE_N, false>)

#define DTYPES(STAGE, GATED)                                                                                           \
  FAMILIES(STAGE, GATED, float, "fp32", float, "_fp32acc")                                                             \
  FAMILIES(STAGE, GATED, half, "fp16", float, "_fp32acc")                                                              \
  FAMILIES(STAGE, GATED, half, "fp16", half, "")                                                                       \
  FAMILIES(STAGE, GATED, bfloat, "bf16", float, "_fp32acc")

DTYPES("gate_up", true)
DTYPES("up", false)
