// A tile of sums that one simdgroup holds, in 8x8 simdgroup matrices.
//
//   sum[m][r][c] += rows[r] . weights_m[c]        r < ROWS, c < COLUMNS, m < MATRICES
//
// All sums of a place (r, c), one per matrix, belong to the same lane, so that gate and up meet without an exchange.
// Weights are stored as rows W[c, k], so fragments of their transpose are loaded transposed.
//
// fp16 accumulation: sums of FP16_RUN elements of K in fp16, those sums added in fp32.
#pragma once
#include "staged_rows.h"
#include <metal_simdgroup_matrix>

constexpr constant uint FP16_RUN = 16;

/// Weights staged in threadgroup memory: matrix m, column c is row m * matrix_step + c.
template <typename T, uint LD>
struct StagedWeights {
  threadgroup const T* base;
  uint matrix_step;

  void load(thread simdgroup_matrix<T, 8, 8>& fragment, uint matrix, uint column, uint k) thread const {
    simdgroup_load(fragment, base + (matrix * matrix_step + column) * LD + k, LD, ulong2(0, 0), true);
  }
};

template <typename T, typename Acc, uint MATRICES, uint ROWS, uint COLUMNS>
struct SimdgroupTile {
  // A block is what stays in registers during a run over K: on a GPU all of the tile, with one thread of a processor
  // with vectors four fragments.
  static constexpr constant bool ONE_LANE = SIMD_WIDTH == 1;
  static constexpr constant uint ROW_FRAGMENTS = ONE_LANE && ROWS > 16 ? 2 : ROWS / 8;
  static constexpr constant uint COLUMN_FRAGMENTS = ONE_LANE ? 4 / (ROW_FRAGMENTS * MATRICES) : COLUMNS / 8;
  static constexpr constant uint BLOCK_COLUMNS = COLUMNS / (8 * COLUMN_FRAGMENTS);
  static constexpr constant uint BLOCKS = BLOCK_COLUMNS * (ROWS / (8 * ROW_FRAGMENTS));
  static constexpr constant uint FRAGMENTS = ROW_FRAGMENTS * MATRICES * COLUMN_FRAGMENTS;

  struct Block {
    simdgroup_matrix<float, 8, 8> fragment[FRAGMENTS];
  };
  Block blocks[BLOCKS];

  static constexpr uint index(uint row_fragment, uint matrix, uint column_fragment) {
    return (row_fragment * MATRICES + matrix) * COLUMN_FRAGMENTS + column_fragment;
  }

  void clear() thread {
    for (uint b = 0; b < BLOCKS; ++b)
      clear(blocks[b].fragment);
  }

  /// Adds the products over K elements. `rows`: ROWS rows of LD elements.
  template <uint K, uint LD, typename Weights>
  void multiply_add(threadgroup const T* rows, thread const Weights& weights) thread {
    for (uint b = 0; b < BLOCKS; ++b) {
      Block sum = blocks[b];
      accumulate<K, LD>(sum, rows + b / BLOCK_COLUMNS * 8 * ROW_FRAGMENTS * LD, weights,
                        b % BLOCK_COLUMNS * 8 * COLUMN_FRAGMENTS);
      blocks[b] = sum;
    }
  }

  /// visit(first_row + r, first_column + c, sums) for every pair of neighbouring columns c, c + 1 (c is even) of this
  /// lane; sums[m][0..1]. `memory`: a place of this simdgroup's own for MATRICES fragments.
  template <typename Visit>
  void for_each_pair(thread const Visit& visit, uint first_row, uint first_column, threadgroup float* memory,
                     uint lane) thread const {
    for (uint b = 0; b < BLOCKS; ++b)
      for (uint i = 0; i < ROW_FRAGMENTS; ++i)
        for (uint j = 0; j < COLUMN_FRAGMENTS; ++j) {
          const uint row = first_row + (b / BLOCK_COLUMNS * ROW_FRAGMENTS + i) * 8;
          const uint column = first_column + (b % BLOCK_COLUMNS * COLUMN_FRAGMENTS + j) * 8;
          for (uint m = 0; m < MATRICES; ++m)
            simdgroup_store(blocks[b].fragment[index(i, m, j)], memory + m * 64, 8);
          simdgroup_barrier(mem_flags::mem_threadgroup);
          for (uint pair = lane; pair < 64 / 2; pair += SIMD_WIDTH) {
            float sums[MATRICES][2];
            for (uint m = 0; m < MATRICES; ++m) {
              sums[m][0] = memory[m * 64 + 2 * pair];
              sums[m][1] = memory[m * 64 + 2 * pair + 1];
            }
            visit(row + pair / 4, column + pair % 4 * 2, sums);
          }
          simdgroup_barrier(mem_flags::mem_threadgroup);
        }
  }

private:
  template <uint K, uint LD, typename Weights>
  static void accumulate(thread Block& sum, threadgroup const T* rows, thread const Weights& weights, uint column) {
    simdgroup_matrix<Acc, 8, 8> part[FRAGMENTS];
    constexpr bool FP16 = sizeof(Acc) == 2;
    for (uint k = 0; k < K; k += 8) {
      if (FP16 && k % FP16_RUN == 0)
        clear(part);
      simdgroup_matrix<T, 8, 8> a[ROW_FRAGMENTS];
      UNROLL
      for (uint i = 0; i < ROW_FRAGMENTS; ++i)
        simdgroup_load(a[i], rows + 8 * i * LD + k, LD);
      UNROLL
      for (uint m = 0; m < MATRICES; ++m) {
        UNROLL
        for (uint j = 0; j < COLUMN_FRAGMENTS; ++j) {
          simdgroup_matrix<T, 8, 8> b;
          weights.load(b, m, column + 8 * j, k);
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
      if (FP16 && (k + 8) % FP16_RUN == 0)
        add(sum, part);
    }
  }

  template <typename Element>
  static void clear(thread simdgroup_matrix<Element, 8, 8> (&fragments)[FRAGMENTS]) {
    UNROLL
    for (uint f = 0; f < FRAGMENTS; ++f)
      fragments[f] = make_filled_simdgroup_matrix<Element, 8, 8>(Element(0.0f));
  }
  static void add(thread Block& sum, thread simdgroup_matrix<Acc, 8, 8> (&part)[FRAGMENTS]) {
    UNROLL
    for (uint f = 0; f < FRAGMENTS; ++f) {
      UNROLL
      for (uint e = 0; e < 64 / SIMD_WIDTH; ++e)
        sum.fragment[f].thread_elements()[e] += float(part[f].thread_elements()[e]);
    }
  }
};
