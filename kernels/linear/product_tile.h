// A tile of a small product in simdgroup matrices (moe/gemm.h), and how its columns are staged: rows of b's transpose,
// zero beyond K, from wherever b lies. The products of columns that b does not have are not stored.
#pragma once
#include "../moe/gemm.h"
#include "matmul.h"

template <typename T>
using ProductTile = GemmTile<T, float, 1, MATMUL_ROW_TILE, MATMUL_TILE_N, true>;

/// Rows of b's transpose, from `first` on; past the last one that one again.
template <typename T>
struct ColumnRows {
  device const T* b;
  uint stride;
  uint first;
  uint columns;

  device const T* at(uint row) thread const { return b + ulong(min(first + row, columns - 1)) * stride; }
};

/// b's transpose: rows along K, copied.
template <typename T>
struct RowsAlongK {
  using Tile = ProductTile<T>;
  RowStager<T, MATMUL_TILE_N, Tile::K_TILE, typename Tile::Layout> stager;
  bool vectorized;

  void start(device const T* b, uint stride, uint columns, uint first_column, bool whole_vectors,
             uint thread_index) thread {
    const ColumnRows<T> rows{b, stride, first_column, columns};
    stager.start(rows, MATMUL_TILE_N, thread_index);
    vectorized = whole_vectors;
  }
  void load(uint, uint) thread const {}
  void store(threadgroup T* to, uint k0, uint K) thread const { stager.copy(to, k0, K, vectorized); }
};

/// b where it cannot be copied, element by element: rows along N (ALONG_K false), which are turned, or rows of its
/// transpose of another type. Neighbouring threads read neighbouring elements.
template <typename From, typename T, bool ALONG_K>
struct ConvertedRows {
  using Tile = ProductTile<T>;
  static constexpr constant uint THREADS = GEMM_LANE_SIMDGROUPS * SIMD_WIDTH;
  static constexpr constant uint PIECE = Vector16<T>::COUNT; // what a layout moves about as a whole
  device const From* b;                                      // of the tile's first column
  ulong k_stride;
  ulong n_stride;
  uint columns; // from the tile's first one on
  uint thread_index;

  void start(device const From* from, uint stride, uint all_columns, uint first_column, bool, uint index) thread {
    k_stride = ALONG_K ? 1 : stride;
    n_stride = ALONG_K ? stride : 1;
    b = from + first_column * n_stride;
    columns = all_columns - first_column;
    thread_index = index;
  }
  void load(uint, uint) thread const {}
  void store(threadgroup T* to, uint k0, uint K) thread const {
    for (uint e = thread_index; e < MATMUL_TILE_N * Tile::K_TILE; e += THREADS) {
      const uint n = ALONG_K ? e / Tile::K_TILE : e % MATMUL_TILE_N;
      const uint k = ALONG_K ? e % Tile::K_TILE : e / MATMUL_TILE_N;
      const bool inside = n < columns && k0 + k < K;
      to[Tile::Layout::at(n, k / PIECE * PIECE) + k % PIECE] =
          inside ? T(b[(k0 + k) * k_stride + n * n_stride]) : T(0.0f);
    }
  }
};

template <typename T>
using RowsAlongN = ConvertedRows<T, T, false>;
template <typename T>
using WidenedRowsAlongK = ConvertedRows<T, float, true>;
