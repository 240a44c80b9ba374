// matmul: out[b] = a[b] b[b], small matrix products where launching and waiting weigh more than arithmetic.
//
//   a [B, M, K]  rows along K, any row stride        out [B, M, N]  contiguous, in a's dtype
//   b [B, K, N]  rows along N (nn), or b's transpose [B, N, K] rows along K (nt), read where it lies; any row stride
//
// gemv_nt  A threadgroup computes columns of up to four rows of a (one-thread simdgroups: of up to 64, four at a time).
//          A simdgroup takes MATMUL_NT_COLUMNS rows of b's transpose, its lanes splitting K, see dot.h.
// gemv_nn  A lane has columns of its own and goes down K; the simdgroups take every MATMUL_SIMDGROUPS-th row of b, and
//          their sums are added in order.
// tile     8x8 simdgroup matrices, see gemm.h: rows of a and of b's transpose staged in threadgroup memory. Rows of b
//          (nn) are turned while they are staged.
//
// All sums are fp32, in a fixed order. Bytes: a, b and out once per threadgroup that shares them, which the caches see
// to: these products fit them.
#include "../moe/gemv.h"
#include "matmul.h"
#include "product_tile.h"

constexpr constant uint MATMUL_LANE_SIMDGROUPS = simdgroups(MATMUL_SIMDGROUPS, SIMD_WIDTH);

/// Columns column .. column + N - 1 of out, from rows of b's transpose.
template <bool VECTORIZED, typename T>
struct DotBlock {
  static constexpr constant uint N = gemv_columns<GEMV_ROWS, 1>(MATMUL_NT_COLUMNS);
  SortedRows<T> rows;
  device T* out; // of row 0
  uint columns;
  uint depth;
  uint column;
  uint lane;

  Rows<T, N> weights(device const T* b, uint stride) thread const {
    Rows<T, N> w;
    w.next = ulong(N) * stride;
    UNROLL
    for (uint i = 0; i < N; ++i)
      w.row[i] = b + ulong(min(column + i, columns - 1)) * stride; // past the edge: the last one again, not stored
    return w;
  }

  template <uint C>
  void run(thread const Rows<T, N>& w, uint first) thread const {
    float sum[N][C];
    dot_block<VECTORIZED, float>(w, rows, first, depth, lane, sum);
    const LaneSums<N * C> sums = sum_lanes<0, N>(sum, lane);
    for (uint e = lane; e < N * C; e += SIMD_WIDTH) {
      const uint n = column + e / C;
      if (n < columns)
        out[ulong(first + e % C) * columns + n] = T(sums.at(e));
    }
  }
};

template <bool VECTORIZED, typename T>
inline void dot_columns(device const T* a, device const T* b, device T* out, uint first_row, uint first_column,
                        constant MatmulArgs& args, uint simdgroup, uint lane) {
  using Block = DotBlock<VECTORIZED, T>;
  const SortedRows<T> rows{a + ulong(first_row) * args.a_row_stride, args.a_row_stride};
  device T* to = out + ulong(first_row) * args.columns;
  const uint count = min(matmul_gemv_rows(SIMD_WIDTH), args.rows - first_row);
  const uint end = min(first_column + matmul_nt_columns(SIMD_WIDTH), args.columns);
  for (uint column = first_column + simdgroup * Block::N; column < end; column += MATMUL_LANE_SIMDGROUPS * Block::N) {
    const Block block{rows, to, args.columns, args.depth, column, lane};
    const Rows<T, Block::N> w = block.weights(b, args.b_row_stride);
    for_row_runs<GEMV_ROWS>(block, w, count);
  }
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(MATMUL_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
matmul_gemv_nt(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device T* out [[buffer(2)]],
               constant MatmulArgs& args [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
               uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  device const T* from = a + ulong(group.z) * args.a_batch_stride;
  device const T* rows = b + ulong(group.z) * args.b_batch_stride;
  device T* to = out + ulong(group.z) * args.rows * args.columns;
  const uint row = group.y * matmul_gemv_rows(SIMD_WIDTH), column = group.x * matmul_nt_columns(SIMD_WIDTH);
  if (args.a_vectorized && args.b_vectorized)
    dot_columns<true>(from, rows, to, row, column, args, simdgroup, lane);
  else
    dot_columns<false>(from, rows, to, row, column, args, simdgroup, lane);
}

/// The columns of one lane for C rows of a, of every MATMUL_LANE_SIMDGROUPS-th row of b from `simdgroup` on.
template <uint C, uint COLUMNS, bool WHOLE, typename T>
inline void add_rows(device const T* a, device const T* b, uint column, constant MatmulArgs& args, uint simdgroup,
                     thread float (&sum)[C][COLUMNS]) {
  for (uint c = 0; c < C; ++c)
    for (uint i = 0; i < COLUMNS; ++i)
      sum[c][i] = 0.0f;
  for (uint k = simdgroup; k < args.depth; k += MATMUL_LANE_SIMDGROUPS) {
    device const T* row = b + ulong(k) * args.b_row_stride + column;
    float w[COLUMNS];
    for (uint i = 0; i < COLUMNS; ++i)
      w[i] = WHOLE || column + i < args.columns ? float(row[i]) : 0.0f;
    UNROLL
    for (uint c = 0; c < C; ++c) {
      const float x = float(a[ulong(c) * args.a_row_stride + k]);
      for (uint i = 0; i < COLUMNS; ++i)
        sum[c][i] = fma(x, w[i], sum[c][i]);
    }
  }
}

/// The same columns of out, of C rows from `first` on; the sums of all simdgroups are added in order.
template <uint C, typename T>
inline void store_row_sums(device const T* a, device const T* b, device T* out, uint first, uint first_column,
                           constant MatmulArgs& args, threadgroup float* sums, uint simdgroup, uint lane) {
  constexpr uint COLUMNS = matmul_nn_columns(SIMD_WIDTH) / SIMD_WIDTH;
  constexpr uint THREADGROUP_COLUMNS = COLUMNS * SIMD_WIDTH;
  const uint column = first_column + lane * COLUMNS;
  device const T* rows = a + ulong(first) * args.a_row_stride;
  device T* to = out + ulong(first) * args.columns;
  float sum[C][COLUMNS];
  if (first_column + THREADGROUP_COLUMNS <= args.columns)
    add_rows<C, COLUMNS, true>(rows, b, column, args, simdgroup, sum);
  else
    add_rows<C, COLUMNS, false>(rows, b, column, args, simdgroup, sum);
  if (MATMUL_LANE_SIMDGROUPS == 1) {
    for (uint c = 0; c < C; ++c)
      for (uint i = 0; i < COLUMNS && column + i < args.columns; ++i)
        to[ulong(c) * args.columns + column + i] = T(sum[c][i]);
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup); // the sums of the rows before have been read
  UNROLL_SHARE
  for (uint c = 0; c < C; ++c) {
    UNROLL_SHARE
    for (uint i = 0; i < COLUMNS; ++i)
      sums[(simdgroup * C + c) * THREADGROUP_COLUMNS + lane * COLUMNS + i] = sum[c][i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = simdgroup * SIMD_WIDTH + lane; e < C * THREADGROUP_COLUMNS; e += MATMUL_LANE_SIMDGROUPS * SIMD_WIDTH) {
    const uint n = first_column + e % THREADGROUP_COLUMNS;
    float total = sums[e];
    for (uint s = 1; s < MATMUL_LANE_SIMDGROUPS; ++s)
      total += sums[s * C * THREADGROUP_COLUMNS + e];
    if (n < args.columns)
      to[ulong(e / THREADGROUP_COLUMNS) * args.columns + n] = T(total);
  }
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(MATMUL_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
matmul_gemv_nn(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device T* out [[buffer(2)]],
               constant MatmulArgs& args [[buffer(3)]], threadgroup float* sums [[threadgroup(0)]],
               uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
               uint lane [[thread_index_in_simdgroup]]) {
  device const T* from = a + ulong(group.z) * args.a_batch_stride;
  device const T* rows = b + ulong(group.z) * args.b_batch_stride;
  device T* to = out + ulong(group.z) * args.rows * args.columns;
  const uint column = group.x * matmul_nn_columns(SIMD_WIDTH);
  const uint first = group.y * matmul_gemv_rows(SIMD_WIDTH);
  const uint end = min(first + matmul_gemv_rows(SIMD_WIDTH), args.rows);
  for (uint row = first; row < end; row += GEMV_ROWS)
    switch (min(GEMV_ROWS, end - row)) {
    case 1:
      store_row_sums<1>(from, rows, to, row, column, args, sums, simdgroup, lane);
      break;
    case 2:
      store_row_sums<2>(from, rows, to, row, column, args, sums, simdgroup, lane);
      break;
    case 3:
      store_row_sums<3>(from, rows, to, row, column, args, sums, simdgroup, lane);
      break;
    default:
      store_row_sums<GEMV_ROWS>(from, rows, to, row, column, args, sums, simdgroup, lane);
    }
}

/// What becomes of a tile's sums.
template <typename T>
struct MatmulStore {
  device T* out; // row 0 of the tile
  uint rows;     // of the tile
  uint first_column;
  uint columns;

  void operator()(uint row, uint column, thread const float (&sums)[1][2]) thread const {
    const uint n = first_column + column;
    if (row < rows && n < columns)
      store_pair(out + ulong(row) * columns, n, columns, columns % 2 == 0, sums[0][0], sums[0][1]);
  }
};

template <typename T, typename Stager>
[[kernel, max_total_threads_per_threadgroup(GEMM_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
matmul_tile(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device T* out [[buffer(2)]],
            constant MatmulArgs& args [[buffer(3)]], threadgroup uchar* memory [[threadgroup(0)]],
            uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
            uint lane [[thread_index_in_simdgroup]]) {
  const uint first_row = group.x * MATMUL_ROW_TILE, first_column = group.y * MATMUL_TILE_N;
  const uint count = min(MATMUL_ROW_TILE, args.rows - first_row);
  const SortedRows<T> rows{a + ulong(group.z) * args.a_batch_stride + ulong(first_row) * args.a_row_stride,
                           args.a_row_stride};
  Stager weights;
  weights.start(b + ulong(group.z) * args.b_batch_stride, args.b_row_stride, args.columns, first_column,
                args.b_vectorized, simdgroup * SIMD_WIDTH + lane);
  ProductTile<T> product;
  product.multiply_decoded(rows, count, weights, args.depth, memory, simdgroup, lane, args.a_vectorized != 0);
  const MatmulStore<T> store{out + (ulong(group.z) * args.rows + first_row) * args.columns, count, first_column,
                             args.columns};
  product.for_each_pair(store, memory, simdgroup, lane);
}

#define INSTANTIATE(NAME, ...) template [[host_name(NAME)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define MATMUL(T, T_NAME)                                                                                              \
  INSTANTIATE("matmul_gemv_nt_" T_NAME, matmul_gemv_nt<T>)                                                             \
  INSTANTIATE("matmul_gemv_nn_" T_NAME, matmul_gemv_nn<T>)                                                             \
  INSTANTIATE("matmul_tile_nt_" T_NAME, matmul_tile<T, RowsAlongK<T>>)                                                 \
  INSTANTIATE("matmul_tile_nn_" T_NAME, matmul_tile<T, RowsAlongN<T>>)

MATMUL(float, "fp32")
MATMUL(half, "fp16")
MATMUL(bfloat, "bf16")
