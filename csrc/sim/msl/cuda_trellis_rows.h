// Products of several rows with trellis weights on NVIDIA GPUs' tensor cores: what cuda_trellis.h decodes, times two
// columns for each row. Weights are decoded once for 4, 8, 16 or 64 rows.
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
    copy(x, to_factor, count, 0, blocks, warp, lane);
    for (uint block = 0; block + 1 < blocks; ++block) {
      if (block % CHUNK == 0) {
        wait_for_copies();
        copy(x, to_factor, count, block + CHUNK, blocks, warp, lane);
      }
      ahead.next_block();
      add_block<true>(ahead, block, values, count, lane, sum);
    }
    if ((blocks - 1) % CHUNK == 0)
      wait_for_copies();
    add_block<false>(ahead, blocks - 1, values, count, lane, sum);
  }

private:
  /// Where a column of 16 bytes (step, part, q) is: columns change places, so that neither the lanes of a load nor
  /// those of a copy want the same banks.
  METAL_FUNC static constexpr uint place_of(uint column, uint part, uint q) { return column ^ (2 * q + part); }

  /// Warps take the blocks of rows in turn: most tiles have few. Nobody looks at columns of rows that are not there.
  template <typename X>
  METAL_FUNC void copy(X x, uint to_factor, uint count, uint first_block, uint blocks, uint warp, uint lane) const {
    const uint slab = first_block / CHUNK % 2, thread = warp * SIMD_WIDTH + lane;
    // Of a block in device memory a lane has the 16 bytes of a column, part, q and step.
    const uint place = lane / 2 * COLUMNS, column = lane % 2, part = lane / 8 % 2, q = lane / 2 % 4;
#pragma unroll
    for (uint i = 0; i < SHARE; ++i) {
      const uint r = (i * WARPS + warp) / CHUNK, block = (i * WARPS + warp) % CHUNK;
      if (r < count && first_block + block < blocks)
        copy_async(words + slab * SLAB_WORDS + r / 4 * FRAGMENT_WORDS + block * BLOCK_WORDS + place +
                       place_of(2 * (r % 4) + column, part, q),
                   x(r) + (first_block + block) * BLOCK + lane * 4, true);
    }
    const uint block = thread / ROWS;
    if (block < CHUNK && thread % ROWS < count && first_block + block < blocks)
      copy_async_part<4>(factors + slab * CHUNK * ROWS + thread, x(thread % ROWS) + to_factor + first_block + block, 4);
    copy_commit();
  }
  METAL_FUNC static void wait_for_copies() {
    copy_wait_own<0>();
    __syncthreads();
  }

  /// A lane's eight words of x of each fragment from `first` on, step s of the block that begins at `block`.
  template <uint COUNT>
  METAL_FUNC static void load(uint32_t (&second)[COUNT][8], const uint4* block, uint first, uint s, uint lane) {
    const uint g = lane / 4, q = lane % 4;
#pragma unroll
    for (uint f = 0; f < COUNT; ++f) {
      const uint4* at = block + (first + f) * FRAGMENT_WORDS + s * BLOCK_WORDS / 2 + q * COLUMNS;
      const uint4 low = at[place_of(g, 0, q)], high = at[4 * COLUMNS + place_of(g, 1, q)];
      second[f][0] = low.x, second[f][1] = low.y, second[f][2] = low.z, second[f][3] = low.w;
      second[f][4] = high.x, second[f][5] = high.y, second[f][6] = high.z, second[f][7] = high.w;
    }
  }

  /// sum += the products of a block. MORE: see TrellisCodesAhead; the last block has a copy of the code of its own, as
  /// CudaRotatedRow's.
  template <bool MORE, uint HALF_BITS, uint CODEBOOK>
  METAL_FUNC void add_block(TrellisCodesAhead<HALF_BITS, TILES>& codes, uint block,
                            const TrellisValues<CODEBOOK>& values, uint count, uint lane,
                            float (&sum)[TILES][FRAGMENTS][2]) const {
    // Few rows: all of a step's x is in registers while it is decoded. Many: a block's weights are, while x passes.
    constexpr bool MANY = FRAGMENTS > 4;
    constexpr uint TOGETHER = MANY ? 2 : FRAGMENTS, STREAM = TrellisCodes<HALF_BITS>::WORDS + 2;
    const uint place = block % (2 * CHUNK), slab = place / CHUNK;
    const uint4* x = words + slab * SLAB_WORDS + place % CHUNK * BLOCK_WORDS;
    const float* factor = factors + place * ROWS + lane % 4;
    const auto add = [&](const float (&part)[TILES][TOGETHER][4], uint first) {
#pragma unroll
      for (uint i = 0; i < TILES; ++i)
#pragma unroll
        for (uint f = 0; f < TOGETHER; ++f) {
          float (&of_rows)[2] = sum[i][first + f];
          of_rows[0] += trellis_row_sum(factor[4 * (first + f)], part[i][f][0], part[i][f][1]);
          of_rows[1] += trellis_row_sum(factor[4 * (first + f)], part[i][f][2], part[i][f][3]);
        }
    };
    if constexpr (MANY) {
      uint32_t a[2][TILES][4][4];
#pragma unroll
      for (uint s = 0; s < 2; ++s) {
        uint32_t stream[TILES][STREAM];
        codes.template take<MORE>(s, lane, stream);
#pragma unroll
        for (uint i = 0; i < TILES; ++i)
          trellis_runs<HALF_BITS, CODEBOOK>(a[s][i], stream[i], values);
      }
#pragma unroll
      for (uint first = 0; first < FRAGMENTS; first += TOGETHER) {
        if (4 * first >= count)
          break;
        float part[TILES][TOGETHER][4] = {};
#pragma unroll
        for (uint s = 0; s < 2; ++s) {
          uint32_t second[TOGETHER][8];
          load(second, x, first, s, lane);
#pragma unroll
          for (uint run = 0; run < 4; ++run)
#pragma unroll
            for (uint i = 0; i < TILES; ++i)
#pragma unroll
              for (uint f = 0; f < TOGETHER; ++f)
                multiply_add_fragments(half{}, part[i][f], a[s][i][run], second[f][2 * run], second[f][2 * run + 1]);
        }
        add(part, first);
      }
    } else {
      float part[TILES][TOGETHER][4] = {};
#pragma unroll
      for (uint s = 0; s < 2; ++s) {
        uint32_t second[TOGETHER][8];
        load(second, x, 0, s, lane);
        uint32_t stream[TILES][STREAM];
        codes.template take<MORE>(s, lane, stream);
#pragma unroll
        for (uint i = 0; i < TILES; ++i)
          trellis_multiply_add<HALF_BITS, CODEBOOK>(part[i], stream[i], second, values);
      }
      add(part, 0);
    }
  }
};

} // namespace metal_sim
