// Matrix product of one row tile with the weights of its expert, in simdgroup matrices.
//
// A threadgroup multiplies ROW_TILE rows (of one expert, gathered as they are loaded) with TILE_N weight rows: TILE_N
// columns of one matrix, or TILE_N / 2 of gate and of up. K is walked in tiles, of which several are on their way where
// threadgroup memory has room (gemm_stages): rows are staged, zero beyond the tile's rows and beyond K; weights are
// staged beside them (base, large_batch: any shape), or loaded as fragments from where they are (simd: H and I
// multiples of 8, rows 16-byte aligned).
//
// Simdgroups divide the columns, and the rows of a large tile. Rows that a tile does not have are not multiplied where
// they are all of a simdgroup's.
#pragma once
#include "../formats/dense.h"
#include "../tiles/async_copy.h"
#include "../tiles/threadgroup_tile.h"
#include "activation.h"
#include "group.h"
#include "row_source.h"

// What a threadgroup may hold in threadgroup memory. Apple's GPUs have 32 KiB; an engine with more defines it.
#ifndef THREADGROUP_BYTES
#define THREADGROUP_BYTES 32768
#endif
// Between staged rows of 16-bit elements, where an engine has a layout of its own for them.
#ifndef THREADGROUP_PAD_BYTES
#define THREADGROUP_PAD_BYTES ROW_PAD_BYTES
#endif

constexpr constant uint GEMM_LANE_SIMDGROUPS = simdgroups(GEMM_SIMDGROUPS, SIMD_WIDTH);

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
template <typename T, uint COLUMNS>
struct TileWeightRows {
  WeightRows<T> weights;
  uint first_column;
  uint K;

  device const T* at(uint row) thread const {
    return weights.at(row / COLUMNS, min(first_column + row % COLUMNS, weights.columns - 1), K);
  }
};

/// Weights that a simdgroup loads as fragments from device memory.
template <typename T>
struct DeviceWeights {
  WeightRows<T> weights;
  uint first_column;
  uint k0;
  uint K;

  void load(thread simdgroup_matrix<T, 8, 8>& fragment, uint matrix, uint column, uint k) thread const {
    const uint n = min(first_column + column, weights.columns - 8);
    if (k0 + k < K)
      simdgroup_load(fragment, weights.at(matrix, n, K) + k0 + k, ulong(weights.column_step) * K, ulong2(0, 0), true);
    else
      fragment = make_filled_simdgroup_matrix<T, 8, 8>(T(0.0f));
  }
};

/// Copies tiles of K from ROWS rows of device memory to threadgroup memory. Each thread has places of its own, the same
/// in every tile.
template <typename T, uint ROWS, uint K_TILE, typename Layout>
struct RowStager {
  static constexpr constant uint THREADS = GEMM_LANE_SIMDGROUPS * SIMD_WIDTH;
  static constexpr constant uint COUNT = Vector16<T>::COUNT;
  static constexpr constant uint VECTORS = K_TILE / COUNT;
  static constexpr constant uint THREADS_PER_ROW = VECTORS < THREADS ? VECTORS : THREADS;
  static constexpr constant uint ROWS_PER_PASS = THREADS / THREADS_PER_ROW;
  static constexpr constant uint PASSES = (ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS;

  device const T* from[PASSES];
  uint count; // rows that there are; the others are zeros
  uint first_row;
  uint first_vector;

  template <typename Source>
  void start(thread const Source& source, uint rows, uint thread_index) thread {
    count = rows;
    first_row = thread_index / THREADS_PER_ROW;
    first_vector = thread_index % THREADS_PER_ROW;
    UNROLL_SHARE
    for (uint pass = 0; pass < PASSES; ++pass)
      from[pass] = source.at(min(first_row + pass * ROWS_PER_PASS, count - 1));
  }

  void copy(threadgroup T* tile, uint k0, uint K, bool vectorized) thread const {
    if (vectorized)
      copy<true>(tile, k0, K);
    else
      copy<false>(tile, k0, K);
  }

private:
  template <bool VECTORIZED>
  void copy(threadgroup T* tile, uint k0, uint K) thread const {
    UNROLL_SHARE
    for (uint pass = 0; pass < PASSES; ++pass) {
      const uint row = first_row + pass * ROWS_PER_PASS;
      if (ROWS % ROWS_PER_PASS != 0 && row >= ROWS)
        break;
      UNROLL_SHARE
      for (uint i = 0; i < VECTORS / THREADS_PER_ROW; ++i) {
        const uint v = first_vector + i * THREADS_PER_ROW;
        threadgroup T* to = tile + Layout::at(row, v * COUNT);
        const uint k = k0 + v * COUNT;
        if (VECTORIZED) {
          copy_async(to, from[pass] + k, row < count && k < K);
        } else {
          for (uint e = 0; e < COUNT; ++e)
            to[e] = row < count && k + e < K ? from[pass][k + e] : T(0.0f);
        }
      }
    }
  }
};

/// The weights of a tile: staged behind the ROW_TILE rows of a stage, or read where they are.
template <bool STAGED, typename T, uint ROW_TILE, uint TILE_N, uint COLUMNS, uint K_TILE, typename Layout>
struct TileWeights {
  RowStager<T, TILE_N, K_TILE, Layout> stager;

  void start(thread const WeightRows<T>& weights, uint tile_column, uint, uint K, uint thread_index) thread {
    const TileWeightRows<T, COLUMNS> rows{weights, tile_column, K};
    stager.start(rows, TILE_N, thread_index);
  }
  void copy(threadgroup T* stage, uint k0, uint K, bool vectorized) thread const {
    stager.copy(stage + Layout::at(ROW_TILE, 0), k0, K, vectorized);
  }
  /// What multiply_add of the sums takes.
  threadgroup const T* at(threadgroup const T* stage, uint) thread const { return stage + Layout::at(ROW_TILE, 0); }
};
template <typename T, uint ROW_TILE, uint TILE_N, uint COLUMNS, uint K_TILE, typename Layout>
struct TileWeights<false, T, ROW_TILE, TILE_N, COLUMNS, K_TILE, Layout> {
  DeviceWeights<T> weights;

  void start(thread const WeightRows<T>& rows, uint tile_column, uint own_column, uint K, uint) thread {
    weights.weights = rows;
    weights.first_column = tile_column + own_column;
    weights.K = K;
  }
  void copy(threadgroup T*, uint, uint, bool) thread const {}
  DeviceWeights<T> at(threadgroup const T*, uint k0) thread const {
    DeviceWeights<T> from = weights;
    from.k0 = k0;
    return from;
  }
};

template <typename T, typename Acc, uint MATRICES, uint ROW_TILE, uint TILE_N, bool STAGE_WEIGHTS>
struct GemmTile {
  static constexpr constant uint WEIGHT_ROWS = STAGE_WEIGHTS ? TILE_N : 0;
  static constexpr constant uint COLUMNS = TILE_N / MATRICES;
  static constexpr constant uint PAD_BYTES = STAGE_WEIGHTS && sizeof(T) == 2 ? THREADGROUP_PAD_BYTES : ROW_PAD_BYTES;
  static constexpr constant uint K_BYTES = gemm_stages(ROW_TILE, WEIGHT_ROWS, PAD_BYTES, THREADGROUP_BYTES).k_bytes;
  static constexpr constant uint STAGE_BYTES =
      gemm_stages(ROW_TILE, WEIGHT_ROWS, PAD_BYTES, THREADGROUP_BYTES).stage_bytes;
  static constexpr constant uint STAGES = gemm_stages(ROW_TILE, WEIGHT_ROWS, PAD_BYTES, THREADGROUP_BYTES).stages;
  static constexpr constant uint K_TILE = K_BYTES / sizeof(T);

  using Sums =
      conditional_t<STAGE_WEIGHTS, StagedTile<T, Acc, MATRICES, ROW_TILE, COLUMNS, GEMM_LANE_SIMDGROUPS, K_BYTES>,
                    ThreadgroupTile<T, Acc, MATRICES, ROW_TILE, COLUMNS, GEMM_LANE_SIMDGROUPS, K_BYTES>>;
  using Layout = typename Sums::Layout;
  static_assert(Layout::ROW_BYTES * (ROW_TILE + WEIGHT_ROWS) == STAGE_BYTES, "host and kernel lay stages out alike");
  Sums sums;

  /// visit(row, column, sums) for this lane's pairs of neighbouring columns, in places of the tile.
  template <typename Visit>
  void for_each_pair(thread const Visit& visit, threadgroup uchar* memory, uint simdgroup, uint lane) thread const {
    sums.for_each_pair(visit, reinterpret_cast<threadgroup float*>(memory + STAGES * STAGE_BYTES), simdgroup, lane);
  }

  /// sums = rows x weights over all of K. `memory`: gemm_threadgroup_bytes.
  template <typename Source>
  void multiply(thread const Source& source, uint count, thread const WeightRows<T>& weights, uint tile_column, uint K,
                bool vectorized, threadgroup uchar* memory, uint simdgroup, uint lane) thread {
    const uint thread_index = simdgroup * SIMD_WIDTH + lane;
    RowStager<T, ROW_TILE, K_TILE, Layout> rows;
    TileWeights<STAGE_WEIGHTS, T, ROW_TILE, TILE_N, COLUMNS, K_TILE, Layout> tile_weights;
    tile_weights.start(weights, tile_column, Sums::first_column(simdgroup), K, thread_index);

    sums.clear();
    const uint steps = (K + K_TILE - 1) / K_TILE;
    // With one stage a tile of K is copied when all have read the one before; with more the copies run STAGES - 1 tiles
    // ahead, into the stage that all have read when they pass the barrier.
    constexpr uint AHEAD = STAGES - 1;
    // At first all weights, whose places are known while those of the rows are still being read.
    UNROLL
    for (uint step = 0; step < AHEAD; ++step)
      if (step < steps)
        tile_weights.copy(stage(memory, step), step * K_TILE, K, vectorized);
    rows.start(source, count, thread_index);
    UNROLL
    for (uint step = 0; step < AHEAD; ++step) {
      if (step < steps)
        rows.copy(stage(memory, step), step * K_TILE, K, vectorized);
      copy_commit();
    }
    for (uint step = 0; step < steps; ++step) {
      if (AHEAD > 0)
        copy_wait<AHEAD - 1>();
      threadgroup_barrier(mem_flags::mem_threadgroup);
      copy_stage(rows, tile_weights, memory, step + AHEAD, steps, K, vectorized);
      if (AHEAD == 0) {
        copy_wait<0>();
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      threadgroup const T* staged = stage(memory, step);
      const auto operand = tile_weights.at(staged, step * K_TILE);
      sums.multiply_add(staged, operand, count, simdgroup);
    }
  }

  /// The same with weights that a stager decodes into the stage: its codes for a tile of K are loaded (`load`) while
  /// the one before is multiplied, and decoded (`store`) when the stage is free. `vectorized`: of the rows.
  template <typename Source, typename Stager>
  void multiply_decoded(thread const Source& source, uint count, thread Stager& weights, uint K,
                        threadgroup uchar* memory, uint simdgroup, uint lane, bool vectorized) thread {
    RowStager<T, ROW_TILE, K_TILE, Layout> rows;
    rows.start(source, count, simdgroup * SIMD_WIDTH + lane);
    sums.clear();
    const uint steps = (K + K_TILE - 1) / K_TILE;
    constexpr uint AHEAD = STAGES - 1;
    weights.load(0, K);
    UNROLL
    for (uint step = 0; step < AHEAD; ++step)
      decode_stage(rows, weights, memory, step, steps, K, vectorized);
    for (uint step = 0; step < steps; ++step) {
      if (AHEAD > 0)
        copy_wait<AHEAD - 1>();
      threadgroup_barrier(mem_flags::mem_threadgroup);
      decode_stage(rows, weights, memory, step + AHEAD, steps, K, vectorized);
      if (AHEAD == 0) {
        copy_wait<0>();
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      threadgroup const T* staged = stage(memory, step);
      sums.multiply_add(staged, staged + Layout::at(ROW_TILE, 0), count, simdgroup);
    }
  }

private:
  template <typename Rows, typename Stager>
  static void decode_stage(thread const Rows& rows, thread Stager& weights, threadgroup uchar* memory, uint step,
                           uint steps, uint K, bool vectorized) {
    if (step < steps) {
      threadgroup T* to = stage(memory, step);
      rows.copy(to, step * K_TILE, K, vectorized);
      weights.store(to + Layout::at(ROW_TILE, 0), step * K_TILE, K);
      weights.load((step + 1) * K_TILE, K);
    }
    copy_commit(); // also of nothing: copy_wait counts groups
  }

  static threadgroup T* stage(threadgroup uchar* memory, uint step) {
    return reinterpret_cast<threadgroup T*>(memory + step % STAGES * STAGE_BYTES);
  }

  template <typename Rows, typename Weights>
  static void copy_stage(thread const Rows& rows, thread const Weights& weights, threadgroup uchar* memory, uint step,
                         uint steps, uint K, bool vectorized) {
    if (step < steps) {
      threadgroup T* to = stage(memory, step);
      rows.copy(to, step * K_TILE, K, vectorized);
      weights.copy(to, step * K_TILE, K, vectorized);
    }
    copy_commit(); // also of nothing: copy_wait counts groups
  }
};

/// Stores two neighbouring elements of a row of `columns` elements; `aligned`: to + column is a multiple of both.
template <typename T>
inline void store_pair(device T* row, uint column, uint columns, bool aligned, float first, float second) {
  if (aligned && column + 1 < columns) {
    *reinterpret_cast<device vec<T, 2>*>(row + column) = vec<T, 2>(T(first), T(second));
    return;
  }
  row[column] = T(first);
  if (column + 1 < columns)
    row[column + 1] = T(second);
}
