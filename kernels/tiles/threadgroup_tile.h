// A tile of sums that a threadgroup holds: its simdgroups divide the columns, and the rows of a large tile.
#pragma once
#include "simdgroup_tile.h"

/// Tile of `SIMDGROUPS` simdgroups with rows, and weights unless they are read from device memory, staged as
/// PaddedRows<T, K_BYTES>.
template <typename T, typename Acc, uint MATRICES, uint ROWS, uint COLUMNS, uint SIMDGROUPS, uint K_BYTES>
struct ThreadgroupTile {
  using Layout = PaddedRows<T, K_BYTES>;
  static constexpr constant uint K = K_BYTES / sizeof(T);
  static constexpr constant uint ROW_PARTS = SIMDGROUPS > 1 && ROWS >= 64 ? 2 : 1;
  static constexpr constant uint COLUMN_PARTS = SIMDGROUPS / ROW_PARTS;
  static constexpr constant uint PART_ROWS = ROWS / ROW_PARTS;
  static constexpr constant uint PART_COLUMNS = COLUMNS / COLUMN_PARTS;

  SimdgroupTile<T, Acc, MATRICES, PART_ROWS, PART_COLUMNS> sums;

  static uint first_row(uint simdgroup) { return simdgroup / COLUMN_PARTS * PART_ROWS; }
  static uint first_column(uint simdgroup) { return simdgroup % COLUMN_PARTS * PART_COLUMNS; }

  void clear() thread { sums.clear(); }

  /// Adds the products over K elements of staged rows, of which there are `count`, and of staged weights: COLUMNS rows
  /// of matrix 0, then those of matrix 1.
  void multiply_add(threadgroup const T* rows, threadgroup const T* weights, uint count, uint simdgroup) thread {
    const StagedWeights<T, Layout::LD> staged{weights + Layout::at(first_column(simdgroup), 0), COLUMNS};
    multiply_add(rows, staged, count, simdgroup);
  }

  /// The same with weights that have a function load (see StagedWeights), of this simdgroup's columns.
  template <typename Weights>
  void multiply_add(threadgroup const T* rows, thread const Weights& weights, uint count, uint simdgroup) thread {
    const uint row = first_row(simdgroup);
    if (row < count) // else all of its rows are beyond those of the tile
      sums.template multiply_add<K, Layout::LD>(rows + Layout::at(row, 0), weights);
  }

  /// visit(row, column, sums) for every pair of neighbouring columns (column is even) of this lane; sums[m][0..1].
  /// `memory`: TILE_EXCHANGE_BYTES for each simdgroup.
  template <typename Visit>
  void for_each_pair(thread const Visit& visit, threadgroup float* memory, uint simdgroup, uint lane) thread const {
    sums.for_each_pair(visit, first_row(simdgroup), first_column(simdgroup), memory + simdgroup * 2 * 64, lane);
  }
};

/// The tile where rows and weights are both staged: an engine may have a faster one for 16-bit elements.
#ifdef METAL_SIM_CUDA
template <typename T, typename Acc, uint MATRICES, uint ROWS, uint COLUMNS, uint SIMDGROUPS, uint K_BYTES>
using StagedTile =
    conditional_t<sizeof(T) == 2, metal_sim::TensorTile<T, sizeof(Acc) == 2, MATRICES, ROWS, COLUMNS, SIMDGROUPS>,
                  ThreadgroupTile<T, Acc, MATRICES, ROWS, COLUMNS, SIMDGROUPS, K_BYTES>>;
#else
template <typename T, typename Acc, uint MATRICES, uint ROWS, uint COLUMNS, uint SIMDGROUPS, uint K_BYTES>
using StagedTile = ThreadgroupTile<T, Acc, MATRICES, ROWS, COLUMNS, SIMDGROUPS, K_BYTES>;
#endif
