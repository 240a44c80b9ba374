// Arguments and tiles of the small matrix product: out [B, M, N] = a [B, M, K] b [B, K, N], see matmul.metal.
#pragma once
#include "../moe/experts.h"

// gemv: dot products, or sums of rows, for few rows of a; with one-thread simdgroups for any number.
/// Simdgroups of a threadgroup on a GPU: in `gemv_nt` each has columns of its own, in `gemv_nn` they share K.
SHARED_CONSTANT uint MATMUL_SIMDGROUPS = GEMV_SIMDGROUPS;
/// Columns of a simdgroup in `gemv_nt`: four rows of a and four of b are 16 sums, which leave registers for two runs of
/// loads.
SHARED_CONSTANT uint MATMUL_NT_COLUMNS = 4;
/// Columns of a lane in `gemv_nn`: neighbouring lanes read neighbouring words of b.
SHARED_CONSTANT uint MATMUL_NN_COLUMNS = 2;
/// The same of a one-thread simdgroup: with four rows of a 16 of the processor's vectors.
SHARED_CONSTANT uint MATMUL_NN_COLUMNS_ONE_LANE = 64;
/// Rows of a that a threadgroup takes, four at a time. On a GPU one such block: more threadgroups. With one-thread
/// simdgroups b comes from memory once for all of them.
SHARED_CONSTANT uint MATMUL_GEMV_ROWS = 4;
SHARED_CONSTANT uint MATMUL_GEMV_ROWS_ONE_LANE = 64;

// tile: simdgroup matrices. Rows and columns of a threadgroup: 64 x 64 are two threadgroups, 1024 x 1024 are 512. Few
// of them is what small products suffer from.
SHARED_CONSTANT uint MATMUL_ROW_TILE = 4 * 8;
SHARED_CONSTANT uint MATMUL_TILE_N = 64;

/// Output columns and rows of a gemv threadgroup.
constexpr uint matmul_nt_columns(uint simd_width) {
  return gemv_threadgroup_columns(MATMUL_SIMDGROUPS * MATMUL_NT_COLUMNS, simd_width);
}
constexpr uint matmul_nn_columns(uint simd_width) {
  return simd_width == 1 ? MATMUL_NN_COLUMNS_ONE_LANE : simd_width * MATMUL_NN_COLUMNS;
}
constexpr uint matmul_gemv_rows(uint simd_width) {
  return simd_width == 1 ? MATMUL_GEMV_ROWS_ONE_LANE : MATMUL_GEMV_ROWS;
}
/// Threadgroup memory of `gemv_nn`: four rows of every simdgroup's sums.
constexpr uint matmul_nn_memory_bytes(uint simd_width) {
  return MATMUL_SIMDGROUPS * 4 * matmul_nn_columns(simd_width) * 4;
}

struct MatmulArgs {
  uint rows;           // M
  uint columns;        // N
  uint depth;          // K
  uint a_row_stride;   // elements between rows of a
  uint b_row_stride;   // elements between rows of b as they lie: K of them (nn) or N (nt)
  uint a_batch_stride; // elements; 0: one matrix for all
  uint b_batch_stride;
  uint a_vectorized; // 1: rows start at multiples of VECTOR_BYTES and have a multiple of 8 elements
  uint b_vectorized;
};

// Buffers: 0 a, 1 b, 2 out [B, M, N] contiguous, 3 MatmulArgs; threadgroup 0: matmul_nn_memory_bytes (gemv_nn),
// gemm_threadgroup_bytes (tile). nn: rows of b lie along N, nt: along K.
// Grid: gemv (ceil(N / columns of a threadgroup), ceil(M / rows of a threadgroup), B); tile (ceil(M / MATMUL_ROW_TILE),
// ceil(N / MATMUL_TILE_N), B).
