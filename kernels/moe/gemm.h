// Matrix product of one row tile with the weights of its expert, in 8x8 simdgroup matrices.
//
// A threadgroup multiplies ROW_TILE rows (of one expert, gathered as they are loaded) with TILE_N columns of each of
// MATRICES weight matrices (gate and up, or one). K is walked in tiles of K_BYTES: rows are staged in threadgroup
// memory, zero beyond the tile's rows and beyond K; weights are staged beside them (base, large_batch: any shape), or
// loaded as fragments from where they are (simd: H and I multiples of 8, rows 16-byte aligned).
//
// Simdgroups divide the columns; gate and up fragments of a column belong to the same simdgroup, so that the
// activation needs no exchange. Weight rows are W[n, k], so fragments of W^T are loaded transposed.
//
// fp16 accumulation: sums of FP16_RUN elements of K in fp16 fragments, those sums added in fp32.
#pragma once
#include "../formats/dense.h"
#include "../tiles/rows.h"
#include "activation.h"
#include "group.h"
#include "row_source.h"
#include <metal_simdgroup_matrix>

constexpr constant uint GEMM_LANE_SIMDGROUPS = simdgroups(GEMM_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint FP16_RUN = 16;

/// The weight rows of one expert: matrix m, column n is row n * column_step + m * matrix_step.
template <typename T>
struct WeightRows {
  device const T* base;
  uint column_step;
  uint matrix_step;
  uint columns;

  device const T* at(uint matrix, uint column, uint K) thread const {
    return base + ulong(column * column_step + matrix * matrix_step) * K;
  }
};

/// The weight rows of a threadgroup as rows to stage: first those of matrix 0, then of matrix 1; past the last column
/// the last one again (its products are not stored).
template <typename T, uint TILE_N>
struct TileWeightRows {
  WeightRows<T> weights;
  uint first_column;
  uint K;

  device const T* at(uint row) thread const {
    return weights.at(row / TILE_N, min(first_column + row % TILE_N, weights.columns - 1), K);
  }
};

/// Copies K_TILE elements from k0 on of `count` rows into rows of LD elements; zero beyond `count` and K.
template <uint ROWS, uint K_TILE, uint LD, typename T, typename Source>
inline void stage_rows(threadgroup T* tile, thread const Source& source, uint count, uint k0, uint K, bool vectorized,
                       uint thread_index) {
  constexpr uint THREADS = GEMM_LANE_SIMDGROUPS * SIMD_WIDTH;
  constexpr uint COUNT = Vector16<T>::COUNT;
  constexpr uint VECTORS = K_TILE / COUNT;
  constexpr uint THREADS_PER_ROW = VECTORS < THREADS ? VECTORS : THREADS;
  for (uint row = thread_index / THREADS_PER_ROW; row < ROWS; row += THREADS / THREADS_PER_ROW) {
    threadgroup T* to = tile + row * LD;
    if (row >= count) {
      for (uint v = thread_index % THREADS_PER_ROW; v < VECTORS; v += THREADS_PER_ROW)
        for (uint e = 0; e < COUNT; ++e)
          to[v * COUNT + e] = T(0.0f);
      continue;
    }
    device const T* from = source.at(row) + k0;
    if (vectorized && k0 + K_TILE <= K) {
      for (uint v = thread_index % THREADS_PER_ROW; v < VECTORS; v += THREADS_PER_ROW)
        *reinterpret_cast<threadgroup Vector16<T>*>(to + v * COUNT) =
            *reinterpret_cast<device const Vector16<T>*>(from + v * COUNT);
    } else {
      for (uint v = thread_index % THREADS_PER_ROW; v < VECTORS; v += THREADS_PER_ROW)
        for (uint e = v * COUNT; e < (v + 1) * COUNT; ++e)
          to[e] = k0 + e < K ? from[e] : T(0.0f);
    }
  }
}

template <typename T, typename Acc, uint MATRICES, uint ROW_TILE, uint TILE_N, uint K_BYTES, bool STAGE_WEIGHTS>
struct GemmTile {
  static constexpr constant uint K_TILE = K_BYTES / sizeof(T);
  static constexpr constant uint LD = (K_BYTES + GEMM_ROW_PAD_BYTES) / sizeof(T);

  // A subtile is what a simdgroup keeps in registers at a time: on a GPU its whole share, one thread of a processor
  // with vectors a block of four fragments, one after the other.
  static constexpr constant bool ONE_LANE = SIMD_WIDTH == 1;
  static constexpr constant uint ROW_FRAGMENTS = ONE_LANE && ROW_TILE > 16 ? 2 : ROW_TILE / 8;
  static constexpr constant uint COLUMN_FRAGMENTS =
      ONE_LANE ? 4 / (ROW_FRAGMENTS * MATRICES) : TILE_N / (8 * GEMM_LANE_SIMDGROUPS);
  static constexpr constant uint SUBTILE_COLUMNS = TILE_N / (8 * COLUMN_FRAGMENTS);
  static constexpr constant uint SUBTILES = SUBTILE_COLUMNS * (ROW_TILE / (8 * ROW_FRAGMENTS)) / GEMM_LANE_SIMDGROUPS;
  static constexpr constant uint FRAGMENTS = SUBTILES * ROW_FRAGMENTS * COLUMN_FRAGMENTS;

  static constexpr constant uint SUBTILE_FRAGMENTS = ROW_FRAGMENTS * MATRICES * COLUMN_FRAGMENTS;

  struct Subtile {
    simdgroup_matrix<float, 8, 8> fragment[SUBTILE_FRAGMENTS];
  };
  static constexpr uint index(uint row_fragment, uint matrix, uint column_fragment) {
    return (row_fragment * MATRICES + matrix) * COLUMN_FRAGMENTS + column_fragment;
  }
  Subtile subtiles[SUBTILES];

  /// Where fragment i of this simdgroup stands in the tile.
  static uint fragment_row(uint i, uint simdgroup) {
    const uint subtile = i / (ROW_FRAGMENTS * COLUMN_FRAGMENTS) * GEMM_LANE_SIMDGROUPS + simdgroup;
    return (subtile / SUBTILE_COLUMNS * ROW_FRAGMENTS + i / COLUMN_FRAGMENTS % ROW_FRAGMENTS) * 8;
  }
  static uint fragment_column(uint i, uint simdgroup) {
    const uint subtile = i / (ROW_FRAGMENTS * COLUMN_FRAGMENTS) * GEMM_LANE_SIMDGROUPS + simdgroup;
    return (subtile % SUBTILE_COLUMNS * COLUMN_FRAGMENTS + i % COLUMN_FRAGMENTS) * 8;
  }
  thread simdgroup_matrix<float, 8, 8>& fragment(uint i, uint matrix) thread {
    return subtiles[i / (ROW_FRAGMENTS * COLUMN_FRAGMENTS)]
        .fragment[index(i / COLUMN_FRAGMENTS % ROW_FRAGMENTS, matrix, i % COLUMN_FRAGMENTS)];
  }

  /// This simdgroup's place for one fragment of each matrix.
  static threadgroup float* fragment_memory(threadgroup uchar* memory, uint simdgroup) {
    constexpr uint TILES_BYTES = (ROW_TILE + (STAGE_WEIGHTS ? MATRICES * TILE_N : 0)) * LD * sizeof(T);
    return reinterpret_cast<threadgroup float*>(memory + TILES_BYTES) + simdgroup * 2 * 64;
  }

  /// One subtile += rows x weights over `steps` * 8 elements of K.
  void accumulate(thread Subtile& sum, threadgroup const T* xs, threadgroup const T* ws,
                  thread const WeightRows<T>& weights, uint first_column, uint k0, uint K, uint row, uint column,
                  uint steps) thread const {
    simdgroup_matrix<Acc, 8, 8> part[SUBTILE_FRAGMENTS];
    constexpr bool FP16 = sizeof(Acc) == 2;
    for (uint step = 0; step < steps; ++step) {
      if (FP16 && step % (FP16_RUN / 8) == 0)
        clear(part);
      simdgroup_matrix<T, 8, 8> a[ROW_FRAGMENTS];
      UNROLL
      for (uint i = 0; i < ROW_FRAGMENTS; ++i)
        simdgroup_load(a[i], xs + (row + 8 * i) * LD + 8 * step, LD);
      UNROLL
      for (uint m = 0; m < MATRICES; ++m) {
        UNROLL
        for (uint j = 0; j < COLUMN_FRAGMENTS; ++j) {
          simdgroup_matrix<T, 8, 8> b;
          if (STAGE_WEIGHTS) {
            simdgroup_load(b, ws + (m * TILE_N + column + 8 * j) * LD + 8 * step, LD, ulong2(0, 0), true);
          } else {
            const uint n = min(first_column + column + 8 * j, weights.columns - 8);
            simdgroup_load(b, weights.at(m, n, K) + k0 + 8 * step, ulong(weights.column_step) * K, ulong2(0, 0), true);
          }
          UNROLL
          for (uint i = 0; i < ROW_FRAGMENTS; ++i) {
            const uint f = index(i, m, j);
            if (FP16)
              simdgroup_multiply_accumulate(part[f], a[i], b, part[f]);
            else
              simdgroup_multiply_accumulate(sum.fragment[f], a[i], b, sum.fragment[f]);
          }
        }
      }
      if (FP16 && ((step + 1) % (FP16_RUN / 8) == 0 || step + 1 == steps))
        add(sum, part);
    }
  }

  template <typename Element>
  static void clear(thread simdgroup_matrix<Element, 8, 8> (&fragments)[SUBTILE_FRAGMENTS]) {
    UNROLL
    for (uint f = 0; f < SUBTILE_FRAGMENTS; ++f)
      fragments[f] = make_filled_simdgroup_matrix<Element, 8, 8>(Element(0.0f));
  }
  static void add(thread Subtile& sum, thread simdgroup_matrix<Acc, 8, 8> (&part)[SUBTILE_FRAGMENTS]) {
    UNROLL
    for (uint f = 0; f < SUBTILE_FRAGMENTS; ++f) {
      UNROLL
      for (uint e = 0; e < 64 / SIMD_WIDTH; ++e)
        sum.fragment[f].thread_elements()[e] += float(part[f].thread_elements()[e]);
    }
  }

  /// subtiles = rows x weights over all of K. `memory`: gemm_threadgroup_bytes.
  template <typename Source>
  void multiply(thread const Source& rows, uint count, thread const WeightRows<T>& weights, uint first_column, uint K,
                bool vectorized, threadgroup uchar* memory, uint simdgroup, uint lane) thread {
    threadgroup T* xs = reinterpret_cast<threadgroup T*>(memory);
    threadgroup T* ws = xs + ROW_TILE * LD;
    const uint thread_index = simdgroup * SIMD_WIDTH + lane;
    const TileWeightRows<T, TILE_N> weight_rows{weights, first_column, K};

    UNROLL
    for (uint s = 0; s < SUBTILES; ++s)
      clear(subtiles[s].fragment);

    for (uint k0 = 0; k0 < K; k0 += K_TILE) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage_rows<ROW_TILE, K_TILE, LD>(xs, rows, count, k0, K, vectorized, thread_index);
      if (STAGE_WEIGHTS)
        stage_rows<MATRICES * TILE_N, K_TILE, LD>(ws, weight_rows, MATRICES * TILE_N, k0, K, vectorized, thread_index);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const uint steps = (min(K_TILE, K - k0) + 7) / 8;
      for (uint s = 0; s < SUBTILES; ++s) {
        const uint first = s * ROW_FRAGMENTS * COLUMN_FRAGMENTS;
        Subtile sum = subtiles[s];
        accumulate(sum, xs, ws, weights, first_column, k0, K, fragment_row(first, simdgroup),
                   fragment_column(first, simdgroup), steps);
        subtiles[s] = sum;
      }
    }
  }
};

/// gate[e] = act(gate[e]) * up[e] over a fragment.
template <uint KIND>
inline void activate_fragment(threadgroup float* gate, threadgroup const float* up, float alpha, float limit,
                              uint lane) {
  for (uint e = lane; e < 64; e += SIMD_WIDTH)
    gate[e] = activate<KIND>(gate[e], KIND == ACTIVATION_RELU2 ? 0.0f : up[e], alpha, limit);
}

inline void activate_fragment(uint kind, threadgroup float* gate, threadgroup const float* up, float alpha, float limit,
                              uint lane) {
  switch (kind) {
  case ACTIVATION_SILU:
    return activate_fragment<ACTIVATION_SILU>(gate, up, alpha, limit, lane);
  case ACTIVATION_GELU:
    return activate_fragment<ACTIVATION_GELU>(gate, up, alpha, limit, lane);
  case ACTIVATION_GELU_TANH:
    return activate_fragment<ACTIVATION_GELU_TANH>(gate, up, alpha, limit, lane);
  case ACTIVATION_RELU2:
    return activate_fragment<ACTIVATION_RELU2>(gate, up, alpha, limit, lane);
  default:
    return activate_fragment<ACTIVATION_SWIGLU_CLAMP>(gate, up, alpha, limit, lane);
  }
}

/// Stores `rows` x `columns` of a fragment in threadgroup memory as T.
template <typename T>
inline void store_fragment(threadgroup const float* from, device T* to, uint stride, uint rows, uint columns,
                           uint lane) {
  constexpr uint COLUMN_LANES = SIMD_WIDTH < 8 ? SIMD_WIDTH : 8;
  for (uint row = lane / COLUMN_LANES; row < rows; row += SIMD_WIDTH / COLUMN_LANES) {
    device T* to_row = to + ulong(row) * stride;
    if (columns == 8) // a count that the compiler knows
      for (uint column = lane % COLUMN_LANES; column < 8; column += COLUMN_LANES)
        to_row[column] = T(from[row * 8 + column]);
    else
      for (uint column = lane % COLUMN_LANES; column < columns; column += COLUMN_LANES)
        to_row[column] = T(from[row * 8 + column]);
  }
}
