// lora: a low-rank addition to a linear layer, each token with an adapter of its own.
//
//   s[t]   = x[t] A[id[t]]^T                              lora_shrink, fp32 [T, r]
//   out[t] = base[t] + scale[id[t]] * s[t] B[id[t]]^T     lora_expand; without a base 0
//
//   x [T, inputs], base [T, outputs]   rows contiguous, any row stride     out [T, outputs]  contiguous, in x's dtype
//   A [L, r, inputs], B [L, outputs, r]  rows contiguous, any other strides; adapter ids [T]
//
// A token whose id is outside 0..L-1 has no adapter: out is its base.
//
// lora_shrink  A threadgroup computes LORA_SHRINK_ROWS columns of s for LORA_TOKENS tokens, those in a row that share
// an
//              adapter together. Its simdgroups share K, which is long where r is short, and their sums are added in
//              order.
// lora_expand  A lane has one column at a time and the whole of K, the rank, which is short; tokens as above.
// ..._tile     One adapter and many tokens: simdgroup matrices, see gemm.h; s and B are multiplied in fp32.
//
// A token's result does not depend on which tokens are computed with it. Bytes: x, A, B, base and out once per
// threadgroup that shares them; s is small and stays in the caches.
#include "../moe/gemv.h"
#include "lora.h"
#include "product_tile.h"

constexpr constant uint LORA_LANE_SIMDGROUPS = simdgroups(LORA_SIMDGROUPS, SIMD_WIDTH);

inline uint adapter_of(device const int* ids, uint token, constant LoraArgs& args) {
  return args.id_words == 0 ? 0 : load_id(ids, ulong(token) * args.id_stride, args.id_words, args.adapters);
}

/// Tokens from `first` on, before `end`, that have its adapter: at most GEMV_ROWS.
inline uint tokens_of_adapter(device const int* ids, uint first, uint end, uint adapter, constant LoraArgs& args) {
  uint count = 1;
  while (count < GEMV_ROWS && first + count < end && adapter_of(ids, first + count, args) == adapter)
    ++count;
  return count;
}

/// Rows first_row .. of one adapter's A, with C tokens.
template <bool VECTORIZED, uint C, typename T>
inline void shrink_tokens(device const T* x, device const T* a, device float* s, uint first_row,
                          constant LoraArgs& args, threadgroup float* sums, uint simdgroup, uint lane) {
  constexpr uint N = gemv_columns<GEMV_ROWS, 1>(LORA_SHRINK_ROWS);
  const uint pieces = divide_up(args.inputs, SIMDGROUP_ELEMENTS);
  const uint share = divide_up(pieces, LORA_LANE_SIMDGROUPS);
  const uint begin = min(simdgroup * share * SIMDGROUP_ELEMENTS, args.inputs);
  const uint end = min(begin + share * SIMDGROUP_ELEMENTS, args.inputs);
  const uint last_row = min(first_row + lora_shrink_rows(SIMD_WIDTH), args.rank);
  Rows<T, C> tokens;
  UNROLL
  for (uint c = 0; c < C; ++c)
    tokens.row[c] = x + ulong(c) * args.x_row_stride + begin;
  for (uint row = first_row; row < last_row; row += N) { // once, on a GPU
    Rows<T, N> w;
    w.next = ulong(N) * args.a_row_stride;
    UNROLL
    for (uint i = 0; i < N; ++i) // past the edge: the last row again, not stored
      w.row[i] = a + ulong(min(row + i, args.rank - 1)) * args.a_row_stride + begin;
    float sum[N][C];
    dot_rows<VECTORIZED, float>(w, tokens, end - begin, lane, sum);
    const LaneSums<N * C> own = sum_lanes<0, N>(sum, lane);
    if (LORA_LANE_SIMDGROUPS == 1) {
      for (uint e = lane; e < N * C; e += SIMD_WIDTH)
        if (row + e / C < last_row)
          s[ulong(e % C) * args.s_row_stride + row + e / C] = own.at(e);
      continue;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup); // the sums of the tokens before have been read
    for (uint e = lane; e < N * C; e += SIMD_WIDTH)
      sums[simdgroup * N * C + e] = own.at(e);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = simdgroup * SIMD_WIDTH + lane; e < N * C; e += LORA_LANE_SIMDGROUPS * SIMD_WIDTH) {
      float total = sums[e];
      for (uint other = 1; other < LORA_LANE_SIMDGROUPS; ++other)
        total += sums[other * N * C + e];
      if (row + e / C < last_row)
        s[ulong(e % C) * args.s_row_stride + row + e / C] = total;
    }
  }
}

template <bool VECTORIZED, typename T>
inline void shrink(device const T* x, device const T* a, device const int* ids, device float* s,
                   constant LoraArgs& args, threadgroup float* sums, uint2 group, uint simdgroup, uint lane) {
  const uint row = group.x * lora_shrink_rows(SIMD_WIDTH);
  const uint end = min((group.y + 1) * lora_tokens(SIMD_WIDTH), args.tokens);
  for (uint token = group.y * lora_tokens(SIMD_WIDTH); token < end;) {
    const uint adapter = adapter_of(ids, token, args);
    const uint count = tokens_of_adapter(ids, token, end, adapter, args);
    device const T* from = x + ulong(token) * args.x_row_stride;
    device const T* rows = a + ulong(adapter) * args.a_adapter_stride;
    device float* to = s + ulong(token) * args.s_row_stride;
    token += count;
    if (adapter == NO_EXPERT)
      continue; // lora_expand does not read them
    switch (count) {
    case 1:
      shrink_tokens<VECTORIZED, 1>(from, rows, to, row, args, sums, simdgroup, lane);
      break;
    case 2:
      shrink_tokens<VECTORIZED, 2>(from, rows, to, row, args, sums, simdgroup, lane);
      break;
    case 3:
      shrink_tokens<VECTORIZED, 3>(from, rows, to, row, args, sums, simdgroup, lane);
      break;
    default:
      shrink_tokens<VECTORIZED, GEMV_ROWS>(from, rows, to, row, args, sums, simdgroup, lane);
    }
  }
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(LORA_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
lora_shrink(device const T* x [[buffer(0)]], device const T* a [[buffer(1)]], device const int* ids [[buffer(2)]],
            device float* s [[buffer(3)]], constant LoraArgs& args [[buffer(4)]],
            threadgroup float* sums [[threadgroup(0)]], uint2 group [[threadgroup_position_in_grid]],
            uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  if (args.a_vectorized)
    shrink<true>(x, a, ids, s, args, sums, group, simdgroup, lane);
  else
    shrink<false>(x, a, ids, s, args, sums, group, simdgroup, lane);
}

/// Elements of the rank that have sums of their own: whole vectors of every dtype, and of the processor.
constexpr constant uint EXPAND_RUN = 8;

/// Column n of C tokens of one adapter.
template <bool VECTORIZED, uint C, typename T>
inline void expand_column(device const float* s, device const T* b, float scale, device const T* base, device T* out,
                          uint n, constant LoraArgs& args) {
  float part[C][EXPAND_RUN];
  UNROLL
  for (uint c = 0; c < C; ++c) {
    UNROLL
    for (uint i = 0; i < EXPAND_RUN; ++i)
      part[c][i] = 0.0f;
  }
  device const T* row = b + ulong(n) * args.b_row_stride;
  const uint whole = args.rank / EXPAND_RUN * EXPAND_RUN;
  for (uint k = 0; k < whole; k += EXPAND_RUN) {
    float w[EXPAND_RUN];
    if (VECTORIZED) {
      UNROLL
      for (uint v = 0; v < EXPAND_RUN; v += 4) {
        const vec<T, 4> four = *reinterpret_cast<device const vec<T, 4>*>(row + k + v);
        UNROLL
        for (uint i = 0; i < 4; ++i)
          w[v + i] = float(four[i]);
      }
    } else {
      UNROLL
      for (uint i = 0; i < EXPAND_RUN; ++i)
        w[i] = float(row[k + i]);
    }
    UNROLL
    for (uint c = 0; c < C; ++c) {
      UNROLL
      for (uint i = 0; i < EXPAND_RUN; ++i)
        part[c][i] = fma(s[ulong(c) * args.s_row_stride + k + i], w[i], part[c][i]);
    }
  }
  for (uint k = whole; k < args.rank; ++k) {
    const float w = float(row[k]);
    UNROLL
    for (uint c = 0; c < C; ++c)
      part[c][0] = fma(s[ulong(c) * args.s_row_stride + k], w, part[c][0]);
  }
  UNROLL
  for (uint c = 0; c < C; ++c) {
    const float sum = ((part[c][0] + part[c][4]) + (part[c][2] + part[c][6])) +
                      ((part[c][1] + part[c][5]) + (part[c][3] + part[c][7]));
    const float from = args.has_base ? float(base[ulong(c) * args.base_row_stride + n]) : 0.0f;
    out[ulong(c) * args.outputs + n] = T(fma(scale, sum, from));
  }
}

template <bool VECTORIZED, typename T>
inline void expand(device const float* s, device const T* b, device const int* ids, device const float* scales,
                   device const T* base, device T* out, constant LoraArgs& args, uint2 group, uint thread_index) {
  constexpr uint THREADS = LORA_LANE_SIMDGROUPS * SIMD_WIDTH;
  const uint first_column = group.x * lora_expand_columns(SIMD_WIDTH);
  const uint last_column = min(first_column + lora_expand_columns(SIMD_WIDTH), args.outputs);
  const uint end = min((group.y + 1) * lora_tokens(SIMD_WIDTH), args.tokens);
  for (uint token = group.y * lora_tokens(SIMD_WIDTH); token < end;) {
    const uint adapter = adapter_of(ids, token, args);
    const uint count = tokens_of_adapter(ids, token, end, adapter, args);
    device const float* from = s + ulong(token) * args.s_row_stride;
    device const T* rows = b + ulong(adapter) * args.b_adapter_stride;
    device const T* added = base + ulong(token) * args.base_row_stride;
    device T* to = out + ulong(token) * args.outputs;
    token += count;
    if (adapter == NO_EXPERT) {
      for (uint n = first_column + thread_index; n < last_column; n += THREADS)
        for (uint c = 0; c < count; ++c)
          to[ulong(c) * args.outputs + n] = args.has_base ? added[ulong(c) * args.base_row_stride + n] : T(0.0f);
      continue;
    }
    const float scale = args.has_scales ? scales[adapter] : args.scale;
    for (uint n = first_column + thread_index; n < last_column; n += THREADS)
      switch (count) {
      case 1:
        expand_column<VECTORIZED, 1>(from, rows, scale, added, to, n, args);
        break;
      case 2:
        expand_column<VECTORIZED, 2>(from, rows, scale, added, to, n, args);
        break;
      case 3:
        expand_column<VECTORIZED, 3>(from, rows, scale, added, to, n, args);
        break;
      default:
        expand_column<VECTORIZED, GEMV_ROWS>(from, rows, scale, added, to, n, args);
      }
  }
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(LORA_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
lora_expand(device const float* s [[buffer(0)]], device const T* b [[buffer(1)]], device const int* ids [[buffer(2)]],
            device const float* scales [[buffer(3)]], device const T* base [[buffer(4)]], device T* out [[buffer(5)]],
            constant LoraArgs& args [[buffer(6)]], uint2 group [[threadgroup_position_in_grid]],
            uint thread_index [[thread_index_in_threadgroup]]) {
  if (args.b_vectorized)
    expand<true>(s, b, ids, scales, base, out, args, group, thread_index);
  else
    expand<false>(s, b, ids, scales, base, out, args, group, thread_index);
}

/// s of one tile: row 0, columns from first_column on.
struct ShrinkStore {
  device float* s;
  uint rows; // of the tile
  uint first_column;
  uint rank;
  uint stride;

  void operator()(uint row, uint column, thread const float (&sums)[1][2]) thread const {
    const uint n = first_column + column;
    if (row < rows && n < rank)
      store_pair(s + ulong(row) * stride, n, rank, stride % 2 == 0, sums[0][0], sums[0][1]);
  }
};

template <typename T>
[[kernel, max_total_threads_per_threadgroup(GEMM_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
lora_shrink_tile(device const T* x [[buffer(0)]], device const T* a [[buffer(1)]], device float* s [[buffer(3)]],
                 constant LoraArgs& args [[buffer(4)]], threadgroup uchar* memory [[threadgroup(0)]],
                 uint2 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                 uint lane [[thread_index_in_simdgroup]]) {
  const uint first = group.x * MATMUL_ROW_TILE, first_column = group.y * MATMUL_TILE_N;
  const uint count = min(MATMUL_ROW_TILE, args.tokens - first);
  const SortedRows<T> rows{x + ulong(first) * args.x_row_stride, args.x_row_stride};
  RowsAlongK<T> columns;
  columns.start(a, args.a_row_stride, args.rank, first_column, args.a_vectorized, simdgroup * SIMD_WIDTH + lane);
  ProductTile<T> product;
  product.multiply_decoded(rows, count, columns, args.inputs, memory, simdgroup, lane, args.a_vectorized != 0);
  const ShrinkStore store{s + ulong(first) * args.s_row_stride, count, first_column, args.rank, args.s_row_stride};
  product.for_each_pair(store, memory, simdgroup, lane);
}

/// out of one tile: row 0, columns from first_column on.
template <typename T>
struct ExpandStore {
  device const T* base;
  device T* out;
  uint rows; // of the tile
  uint first_column;
  float scale;
  constant LoraArgs& args;

  void operator()(uint row, uint column, thread const float (&sums)[1][2]) thread const {
    const uint n = first_column + column;
    if (row >= rows || n >= args.outputs)
      return;
    float value[2];
    UNROLL
    for (uint i = 0; i < 2; ++i) {
      const bool added = args.has_base && n + i < args.outputs;
      const float from = added ? float(base[ulong(row) * args.base_row_stride + n + i]) : 0.0f;
      value[i] = fma(scale, sums[0][i], from);
    }
    store_pair(out + ulong(row) * args.outputs, n, args.outputs, args.outputs % 2 == 0, value[0], value[1]);
  }
};

template <typename T>
[[kernel, max_total_threads_per_threadgroup(GEMM_LANE_SIMDGROUPS* SIMD_WIDTH)]] void
lora_expand_tile(device const float* s [[buffer(0)]], device const T* b [[buffer(1)]],
                 device const float* scales [[buffer(3)]], device const T* base [[buffer(4)]],
                 device T* out [[buffer(5)]], constant LoraArgs& args [[buffer(6)]],
                 threadgroup uchar* memory [[threadgroup(0)]], uint2 group [[threadgroup_position_in_grid]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint first = group.x * MATMUL_ROW_TILE, first_column = group.y * MATMUL_TILE_N;
  const uint count = min(MATMUL_ROW_TILE, args.tokens - first);
  const SortedRows<float> rows{s + ulong(first) * args.s_row_stride, args.s_row_stride};
  WidenedRowsAlongK<T> columns;
  columns.start(b, args.b_row_stride, args.outputs, first_column, false, simdgroup * SIMD_WIDTH + lane);
  ProductTile<float> product;
  product.multiply_decoded(rows, count, columns, args.rank, memory, simdgroup, lane, args.rank % 4 == 0);
  const float scale = args.has_scales ? scales[0] : args.scale;
  const ExpandStore<T> store{
      base + ulong(first) * args.base_row_stride, out + ulong(first) * args.outputs, count, first_column, scale, args};
  product.for_each_pair(store, memory, simdgroup, lane);
}

#define INSTANTIATE(NAME, ...) template [[host_name(NAME)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define LORA(T, T_NAME)                                                                                                \
  INSTANTIATE("lora_shrink_" T_NAME, lora_shrink<T>)                                                                   \
  INSTANTIATE("lora_expand_" T_NAME, lora_expand<T>)                                                                   \
  INSTANTIATE("lora_shrink_tile_" T_NAME, lora_shrink_tile<T>)                                                         \
  INSTANTIATE("lora_expand_tile_" T_NAME, lora_expand_tile<T>)

LORA(float, "fp32")
LORA(half, "fp16")
LORA(bfloat, "bf16")
