// Products of several rows with trellis weights on NVIDIA GPUs' tensor cores: what cuda_trellis.h decodes, times two
// columns for each row. Weights are decoded once for 4, 8 or 16 rows.
#pragma once

#include "cuda_trellis.h"

namespace metal_sim {

/// Rows of x times columns of tiles, by the warps of a threadgroup: WARPS * TILES columns side by side. Rows of x are
/// what CudaRotatedRow has stored. All warps copy them, CHUNK blocks at a time, to two slabs of shared memory in turn:
/// a chunk is on its way while the one before it is multiplied.
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

  /// sum[i][f][h], in lane (g, q): output g + 8 * h of the warp's column i of tiles for row 4 * f + q of `count`, x(r)
  /// being the first block of row r, whose factor is `to_factor` elements further on. `codes`: of the threadgroup. All
  /// threads must take part.
  template <uint HALF_BITS, uint CODEBOOK, typename X>
  METAL_FUNC void multiply(const uint* codes, uint row_stride, uint blocks, X x, uint to_factor, uint count, uint warp,
                           uint lane, float (&sum)[TILES][FRAGMENTS][2]) const {
    const TrellisValues<CODEBOOK> values(lane);
    TrellisCodesAhead<HALF_BITS, TILES> ahead(codes + warp * TILES * (4 * HALF_BITS), row_stride, lane);
#pragma unroll
    for (uint i = 0; i < TILES; ++i)
#pragma unroll
      for (uint f = 0; f < FRAGMENTS; ++f)
        sum[i][f][0] = sum[i][f][1] = 0.0f;
    Source source;
#pragma unroll
    for (uint i = 0; i < SHARE; ++i)
      source.row[i] = row_of(i, warp) < count ? x(row_of(i, warp)) : nullptr;
    source.factor = warp == 0 && lane < CHUNK * ROWS && lane % ROWS < count ? x(lane % ROWS) + to_factor : nullptr;
    copy(source, 0, blocks, warp, lane);
    for (uint block = 0; block + 1 < blocks; ++block) {
      if (block % CHUNK == 0) {
        wait_for_copies();
        copy(source, block + CHUNK, blocks, warp, lane);
      }
      ahead.next_block();
      add_block<true>(ahead, block, values, lane, sum);
    }
    if ((blocks - 1) % CHUNK == 0)
      wait_for_copies();
    add_block<false>(ahead, blocks - 1, values, lane, sum);
  }

private:
  /// Where a column of 16 bytes (step, part, q) is: columns change places, so that neither the lanes of a load nor
  /// those of a copy want the same banks.
  METAL_FUNC static constexpr uint place_of(uint column, uint part, uint q) { return column ^ (2 * q + part); }

  /// What a warp copies of a chunk: block block_of(i) of row row_of(i), in turn, as most tiles have few rows; lanes of
  /// the first one a factor each. Null where a row is not there: nobody looks at its columns.
  struct Source {
    const float* row[SHARE];
    const float* factor;
  };
  METAL_FUNC static uint row_of(uint i, uint warp) { return (i * WARPS + warp) / CHUNK; }
  METAL_FUNC static uint block_of(uint i, uint warp) { return (i * WARPS + warp) % CHUNK; }

  METAL_FUNC void copy(const Source& source, uint first_block, uint blocks, uint warp, uint lane) const {
    const uint slab = first_block / CHUNK % 2;
    // Of a block in device memory a lane has the 16 bytes of a column, part, q and step.
    const uint place = lane / 2 * COLUMNS, column = lane % 2, part = lane / 8 % 2, q = lane / 2 % 4;
#pragma unroll
    for (uint i = 0; i < SHARE; ++i) {
      const uint r = row_of(i, warp), block = block_of(i, warp);
      if (source.row[i] && first_block + block < blocks)
        copy_async(words + slab * SLAB_WORDS + r / 4 * FRAGMENT_WORDS + block * BLOCK_WORDS + place +
                       place_of(2 * (r % 4) + column, part, q),
                   source.row[i] + (first_block + block) * BLOCK + lane * 4, true);
    }
    if (source.factor && first_block + lane / ROWS < blocks)
      copy_async_part<4>(factors + slab * CHUNK * ROWS + lane, source.factor + first_block + lane / ROWS, 4);
    copy_commit();
  }
  METAL_FUNC static void wait_for_copies() {
    copy_wait_own<0>();
    __syncthreads();
  }

  /// sum += the products of a block. MORE: see TrellisCodesAhead; the last block has a copy of the code of its own, as
  /// CudaRotatedRow's.
  template <bool MORE, uint HALF_BITS, uint CODEBOOK>
  METAL_FUNC void add_block(TrellisCodesAhead<HALF_BITS, TILES>& codes, uint block,
                            const TrellisValues<CODEBOOK>& values, uint lane, float (&sum)[TILES][FRAGMENTS][2]) const {
    const uint g = lane / 4, q = lane % 4;
    const uint place = block % (2 * CHUNK), slab = place / CHUNK;
    const uint4* fragment = words + slab * SLAB_WORDS + place % CHUNK * BLOCK_WORDS + q * COLUMNS;
    float part[TILES][FRAGMENTS][4] = {};
#pragma unroll
    for (uint s = 0; s < 2; ++s) {
      uint32_t second[FRAGMENTS][8];
#pragma unroll
      for (uint f = 0; f < FRAGMENTS; ++f) {
        const uint4* at = fragment + f * FRAGMENT_WORDS + s * BLOCK_WORDS / 2;
        const uint4 low = at[place_of(g, 0, q)], high = at[4 * COLUMNS + place_of(g, 1, q)];
        second[f][0] = low.x, second[f][1] = low.y, second[f][2] = low.z, second[f][3] = low.w;
        second[f][4] = high.x, second[f][5] = high.y, second[f][6] = high.z, second[f][7] = high.w;
      }
      uint32_t stream[TILES][TrellisCodes<HALF_BITS>::WORDS + 2];
      codes.template take<MORE>(s, lane, stream);
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
  }
};

} // namespace metal_sim
