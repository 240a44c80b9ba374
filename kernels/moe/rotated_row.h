// A row of rotated activations in threadgroup memory, in blocks of 128, and its product with trellis weights; rows of
// them in device memory.
//
// A tile's lanes: lane l decodes run l, 8 weights of 4 inputs and 2 outputs; the four lanes of one quarter, l / 4,
// share those outputs. An engine with matrix instructions may keep the row in another form and divide tiles in another
// way: it gives the same sums, to rounding, in the same lanes.
#pragma once
#include "../formats/trellis.h"
#include "../tiles/hadamard.h"

/// Threadgroup memory of a row of `blocks` blocks: its values, or two parts of half their size each, and a factor for
/// each block.
constexpr uint rotated_row_bytes(uint blocks) { return blocks * (HADAMARD_BLOCK + 1) * 4; }
/// Elements, of four bytes, from a row in device memory to the next: the same, and a multiple of 16 bytes.
constexpr uint rotated_stride(uint blocks) { return (blocks * (HADAMARD_BLOCK + 1) + 3) / 4 * 4; }

#ifdef __METAL_VERSION__

/// Asks for codes that the threadgroup reads after having rotated its row: `rows` rows of `bytes` bytes.
inline void prefetch_codes(device const uint* codes, uint row_stride, uint bytes, uint rows, uint thread_index) {
#ifdef METAL_SIM_CUDA
  if (thread_index < rows)
    metal_sim::cuda_prefetch(codes + ulong(thread_index) * row_stride, bytes);
#else
  (void)codes, (void)row_stride, (void)bytes, (void)rows, (void)thread_index;
#endif
}

/// A lane's consecutive values of a block of a row in device memory, which has `blocks` blocks.
inline void store_rotated(device float* row, uint blocks, uint block, uint lane,
                          thread const float (&value)[HADAMARD_LANE_VALUES]) {
#ifdef METAL_SIM_CUDA
  metal_sim::CudaRotatedRow(row, blocks).store(block, lane, value);
#else
  (void)blocks;
  UNROLL_SHARE
  for (uint i = 0; i < HADAMARD_LANE_VALUES; ++i)
    row[block * HADAMARD_BLOCK + lane * HADAMARD_LANE_VALUES + i] = value[i];
#endif
}

#ifdef METAL_SIM_CUDA
using RotatedRow = metal_sim::CudaRotatedRow;
#else
struct RotatedRow {
  threadgroup float* x;

  RotatedRow(threadgroup float* memory, uint blocks) : x(memory) { (void)blocks; }

  /// A lane's consecutive values of a block.
  void store(uint block, uint lane, thread const float (&value)[HADAMARD_LANE_VALUES]) thread const {
    UNROLL_SHARE
    for (uint i = 0; i < HADAMARD_LANE_VALUES; ++i)
      x[block * HADAMARD_BLOCK + lane * HADAMARD_LANE_VALUES + i] = value[i];
  }

#if SIMD_WIDTH == 1
  /// sum[i][n]: output n of column i of TILES columns of tiles that lie side by side, of which there are `count`; rows
  /// of tiles are `row_stride` words apart.
  template <uint HALF_BITS, uint CODEBOOK, uint TILES>
  void multiply(device const uint* codes, uint row_stride, uint blocks, uint count,
                thread float (&sum)[TILES][TRELLIS_TILE]) thread const {
    float part[TILES][1][TRELLIS_SUMS];
    for (uint i = 0; i < count; ++i)
      for (uint t = 0; t < TRELLIS_SUMS; ++t)
        part[i][0][t] = 0.0f;
    for (uint k = 0; k < blocks * (HADAMARD_BLOCK / TRELLIS_TILE); ++k) {
      float ordered[1][TRELLIS_ROUND];
      for (uint t = 0; t < TRELLIS_ROUND; ++t)
        ordered[0][t] = x[k * TRELLIS_TILE + trellis_input(t / TRELLIS_RUN, t % TRELLIS_RUN)];
      for (uint i = 0; i < count; ++i)
        trellis_add_tile<HALF_BITS, CODEBOOK>(codes + ulong(k) * row_stride + i * 4 * HALF_BITS, row_stride, ordered, 1,
                                              part[i]);
    }
    for (uint i = 0; i < count; ++i)
      for (uint n = 0; n < TRELLIS_TILE; ++n)
        sum[i][n] = trellis_sum(part[i][0], n);
  }
#else
  /// sum[i][h], in lanes that are multiples of 4: output lane / 4 + 8 * h of column i of TILES columns of tiles that
  /// lie side by side; rows of tiles are `row_stride` words apart. The next tiles' words are on their way while these
  /// are decoded.
  template <uint HALF_BITS, uint CODEBOOK, uint TILES>
  void multiply(device const uint* codes, uint row_stride, uint blocks, uint lane,
                thread float (&sum)[TILES][2]) thread const {
    const uint tiles = blocks * (HADAMARD_BLOCK / TRELLIS_TILE);
    threadgroup const float* from = x + trellis_input(lane, 0);
    TrellisRun<HALF_BITS> words[TILES];
    UNROLL
    for (uint i = 0; i < TILES; ++i) {
      sum[i][0] = sum[i][1] = 0.0f;
      words[i].load(codes + i * trellis_tile_bytes(HALF_BITS) / 4, lane);
    }
    for (uint k = 0; k < tiles; ++k) {
      const float input[4] = {from[0], from[1], from[8], from[9]};
      from += TRELLIS_TILE;
      codes += row_stride;
      UNROLL
      for (uint i = 0; i < TILES; ++i) {
        const TrellisRun<HALF_BITS> now = words[i];
        if (k + 1 < tiles)
          words[i].load(codes + i * trellis_tile_bytes(HALF_BITS) / 4, lane);
        UNROLL
        for (uint t = 0; t < TRELLIS_RUN; ++t)
          sum[i][t / 4] = fma(trellis_value<CODEBOOK>(now.state(t)), input[t % 4], sum[i][t / 4]);
      }
    }
    UNROLL
    for (uint i = 0; i < TILES; ++i) {
      UNROLL
      for (uint h = 0; h < 2; ++h) {
        sum[i][h] += simd_shuffle_xor(sum[i][h], ushort(1));
        sum[i][h] += simd_shuffle_xor(sum[i][h], ushort(2));
      }
    }
  }
#endif
};
#endif

#endif
