// Products of several rows with trellis weights on NVIDIA GPUs' tensor cores: what cuda_trellis.h decodes, times two
// columns for each row. Weights are decoded once for 4, 8 or 16 rows.
#pragma once

#include "cuda_trellis.h"

namespace metal_sim {

/// Rows of x times columns of tiles, by the warps of a threadgroup: WARPS * TILES columns side by side. All warps split
/// the rows, CHUNK blocks at a time, into two slabs of shared memory in turn: a chunk's values are on their way while
/// the one before it is multiplied.
template <uint ROWS, uint WARPS, uint TILES>
struct CudaTrellisRows {
  static constexpr uint BLOCK = 128, FRAGMENTS = ROWS / 4, COLUMNS = 8;                   // of a fragment: four rows
  static constexpr uint CHUNK = ROWS >= 16 ? 1 : 16 / ROWS, SHARE = ROWS * CHUNK / WARPS; // of a warp: blocks of a row
  static constexpr uint BLOCK_WORDS = 16 * COLUMNS, FRAGMENT_WORDS = CHUNK * BLOCK_WORDS; // of 16 bytes
  static constexpr uint SLAB_WORDS = FRAGMENTS * FRAGMENT_WORDS, SLABS_BYTES = 2 * SLAB_WORDS * 16;
  static constexpr uint BYTES = SLABS_BYTES + 2 * CHUNK * ROWS * 4;
  uint4* words;
  float* factors; // [slab][block][row]

  METAL_FUNC explicit CudaTrellisRows(float* memory)
      : words(reinterpret_cast<uint4*>(memory)), factors(memory + SLABS_BYTES / 4) {}

  /// A warp's share of a chunk, x(r) being row r of `count`. Warps take rows in turn: most tiles have few. Nobody looks
  /// at columns of other rows.
  template <typename X>
  METAL_FUNC void load(uint4 (&value)[SHARE], X x, uint count, uint first_block, uint blocks, uint warp,
                       uint lane) const {
#pragma unroll
    for (uint i = 0; i < SHARE; ++i) {
      const uint r = (i * WARPS + warp) / CHUNK, block = first_block + (i * WARPS + warp) % CHUNK;
      if (r < count && block < blocks)
        value[i] = *reinterpret_cast<const uint4*>(x(r) + block * BLOCK + lane * 4);
    }
  }
  METAL_FUNC void store(const uint4 (&value)[SHARE], uint count, uint first_block, uint blocks, uint warp,
                        uint lane) const {
    const uint slab = first_block / CHUNK % 2;
#pragma unroll
    for (uint i = 0; i < SHARE; ++i) {
      const uint r = (i * WARPS + warp) / CHUNK, block = (i * WARPS + warp) % CHUNK;
      if (r >= count || first_block + block >= blocks)
        continue;
      const float four[4] = {__builtin_bit_cast(float, value[i].x), __builtin_bit_cast(float, value[i].y),
                             __builtin_bit_cast(float, value[i].z), __builtin_bit_cast(float, value[i].w)};
      const float factor =
          store_trellis_block<COLUMNS>(words + slab * SLAB_WORDS + r / 4 * FRAGMENT_WORDS, block, r % 4, lane, four);
      if (lane == 0)
        factors[(slab * CHUNK + block) * ROWS + r] = factor;
    }
  }

  /// sum[i][f][h], in lane (g, q): output g + 8 * h of the warp's column i of tiles for row 4 * f + q. `codes`: of the
  /// threadgroup. All threads must take part.
  template <uint HALF_BITS, uint CODEBOOK, typename X>
  METAL_FUNC void multiply(const uint* codes, uint row_stride, uint blocks, X x, uint count, uint warp, uint lane,
                           float (&sum)[TILES][FRAGMENTS][2]) const {
    constexpr uint TILE_WORDS = 4 * HALF_BITS, WORDS = TrellisCodes<HALF_BITS>::WORDS;
    const uint g = lane / 4, q = lane % 4;
    const TrellisValues<CODEBOOK> values(lane);
    const uint* from = codes + size_t(q) * row_stride + warp * TILES * TILE_WORDS;
    TrellisCodes<HALF_BITS> ahead[2][TILES];
#pragma unroll
    for (uint s = 0; s < 2; ++s)
#pragma unroll
      for (uint i = 0; i < TILES; ++i)
        ahead[s][i].load(from + s * size_t(4 * row_stride) + i * TILE_WORDS, g);
#pragma unroll
    for (uint i = 0; i < TILES; ++i)
#pragma unroll
      for (uint f = 0; f < FRAGMENTS; ++f)
        sum[i][f][0] = sum[i][f][1] = 0.0f;
    uint4 next[SHARE];
    load(next, x, count, 0, blocks, warp, lane);
    store(next, count, 0, blocks, warp, lane);
    for (uint block = 0; block < blocks; ++block) {
      if (block % CHUNK == 0) {
        __syncthreads();
        load(next, x, count, block + CHUNK, blocks, warp, lane);
      }
      from += size_t(8) * row_stride;
      const uint place = block % (2 * CHUNK), slab = place / CHUNK;
      const uint4* fragment = words + slab * SLAB_WORDS + place % CHUNK * BLOCK_WORDS + q * COLUMNS;
      float part[TILES][FRAGMENTS][4] = {};
#pragma unroll
      for (uint s = 0; s < 2; ++s) {
        uint32_t second[FRAGMENTS][8];
#pragma unroll
        for (uint f = 0; f < FRAGMENTS; ++f) {
          const uint4* at = fragment + f * FRAGMENT_WORDS + s * BLOCK_WORDS / 2;
          const uint4 low = at[trellis_column<COLUMNS>(g, 0, q)],
                      high = at[4 * COLUMNS + trellis_column<COLUMNS>(g, 1, q)];
          second[f][0] = low.x, second[f][1] = low.y, second[f][2] = low.z, second[f][3] = low.w;
          second[f][4] = high.x, second[f][5] = high.y, second[f][6] = high.z, second[f][7] = high.w;
        }
        uint32_t stream[TILES][WORDS + 2];
#pragma unroll
        for (uint i = 0; i < TILES; ++i)
          ahead[s][i].align(lane, stream[i]);
        if (block + 1 < blocks)
#pragma unroll
          for (uint i = 0; i < TILES; ++i)
            ahead[s][i].load(from + s * size_t(4 * row_stride) + i * TILE_WORDS, g);
#pragma unroll
        for (uint i = 0; i < TILES; ++i)
          trellis_multiply_add<HALF_BITS, CODEBOOK>(part[i], stream[i], second, values);
      }
      const float* factor = factors + place * ROWS + q;
#pragma unroll
      for (uint i = 0; i < TILES; ++i)
#pragma unroll
        for (uint f = 0; f < FRAGMENTS; ++f) {
          sum[i][f][0] += trellis_row_sum(factor[4 * f], part[i][f][0], part[i][f][1]);
          sum[i][f][1] += trellis_row_sum(factor[4 * f], part[i][f][2], part[i][f][3]);
        }
      if (block % CHUNK == CHUNK - 1)
        store(next, count, block + 1, blocks, warp, lane);
    }
  }
};

} // namespace metal_sim
