// Products with weights of 4-bit affine codes on NVIDIA GPUs' tensor cores, for few rows of x. Compute capability 8.0
// or later.
//
// A code is the low end of a 16-bit float's significand: codes become operands in place, a pair by one shift and one
// logical operation, as OFFSET + code. m16n8k16 takes 16 weight rows times 16 of K as its first factor: of them lane
// (g, t), g = lane / 4, t = lane % 4, holds rows g and g + 8 at two pairs of K. K is what the product sums over, in any
// order: a lane takes whole words of its rows, eight codes each, whose pairs are codes i and i + 4. The second factor
// are eight rows of x, of which lane (g, t) holds the same elements of row g. Codes of one scale group are summed in a
// fragment of their own, then with scale s and bias b of a weight row:
//
//   sum of (s * code + b) * x = s * fragment + (b - OFFSET * s) * total of x
//
// and the totals come from a product with ones. Sums are fp32.
//
// Warps take slabs of K in turn, each with two slabs of its own in shared memory: one that is multiplied, one on its
// way. No warp waits for another before the sums are added up.
#pragma once

// A test on a processor brings the words of its own.
#ifndef METAL_SIM_TEST_WARPS
#include "cuda_tile.h"
#endif

namespace metal_sim {

/// One matrix of codes, as formats/quantized.h describes it.
struct PackedMatrix {
  const uchar* codes;
  const uchar* scales;
  const uchar* biases;
  uint codes_stride; // bytes between rows
  uint scales_stride;
};

/// What a pair of codes is decoded as: OFFSET + code, both exact. The mask is in a register: as a constant the compiler
/// would make it anew for each pair.
template <typename T>
struct PackedCodes;
template <>
struct PackedCodes<half> {
  static constexpr float OFFSET = 64.0f;
  static constexpr uint32_t ONES = 0x3C003C00u;
  uint32_t mask = __activemask() & 0x00F000F0u; // all lanes take part, which the compiler does not know

  /// Codes i and i + 4 of a word.
  METAL_FUNC uint32_t pair(uint32_t word, uint i) const {
    return and_or(i == 0 ? word << 4 : word >> (4 * i - 4), mask, 0x54005400u);
  }
};
template <>
struct PackedCodes<bfloat> {
  static constexpr float OFFSET = 128.0f;
  static constexpr uint32_t ONES = 0x3F803F80u;
  uint32_t mask = __activemask() & 0x000F000Fu;

  METAL_FUNC uint32_t pair(uint32_t word, uint i) const { return and_or(word >> 4 * i, mask, 0x43004300u); }
};

/// MATRICES matrices of WEIGHT_ROWS rows each, a multiple of 16, times X_ROWS rows of x: 1, 8 or 16. GROUP: columns of
/// a scale; FP16_SCALES: they are fp16, else bf16.
template <typename T, uint GROUP, bool FP16_SCALES, uint MATRICES, uint WEIGHT_ROWS, uint X_ROWS, uint SLAB, uint WARPS>
struct PackedProduct {
  static constexpr uint ROWS = MATRICES * WEIGHT_ROWS, FRAGMENTS = ROWS / 16;
  static constexpr uint COLUMN_FRAGMENTS = (X_ROWS + 7) / 8, COLUMNS = 8 * COLUMN_FRAGMENTS;
  static constexpr uint PIECE_CODES = 32;            // of 16 bytes
  static constexpr uint PIECES = SLAB / PIECE_CODES; // of a row
  static constexpr uint WORDS = GROUP / PIECE_CODES; // of a lane, of a row of a group; also a group's pieces
  static constexpr uint GROUPS = SLAB / GROUP;
  static constexpr uint LINE_ROWS = 8 / PIECES; // of all banks
  static constexpr uint ROW_BYTES = SLAB / 2, SCALE_BYTES = 2 * GROUPS;
  static constexpr uint X_BYTES = SLAB * sizeof(T) + (X_ROWS > 1 ? 16 : 0); // rows that begin in different banks
  static constexpr uint SCALES_AT = ROWS * ROW_BYTES, X_AT = SCALES_AT + (2 * ROWS * SCALE_BYTES + 15) / 16 * 16;
  static constexpr uint SLAB_BYTES = X_AT + X_ROWS * X_BYTES;
  static constexpr uint STAGES = 2;
  static constexpr uint SUM_BYTES = WARPS * COLUMNS * ROWS * 4;
  /// Of shared memory.
  static constexpr uint BYTES = WARPS * STAGES * SLAB_BYTES > SUM_BYTES ? WARPS * STAGES * SLAB_BYTES : SUM_BYTES;
  static_assert(sizeof(T) == 2 && PIECES >= WORDS && 8 % PIECES == 0 && WEIGHT_ROWS % 16 == 0);

  float sum[FRAGMENTS][COLUMN_FRAGMENTS][4];

  METAL_FUNC void clear() {
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (uint n = 0; n < COLUMN_FRAGMENTS; ++n)
#pragma unroll
        for (uint e = 0; e < 4; ++e)
          sum[f][n][e] = 0.0f;
  }

  /// Starts copying K first .. first + SLAB - 1 of weight rows first_row .. (past last_row it again) and of `count`
  /// rows of x. `x(row)`: where a row begins. What is beyond K is zeros.
  template <typename X>
  METAL_FUNC static void copy(uchar* slab, const PackedMatrix (&matrices)[MATRICES], uint first_row, uint last_row,
                              const X& x, uint count, uint first, uint K, uint lane) {
    constexpr uint ROWS_AT_ONCE = SIMD_WIDTH / PIECES;
    const uint piece = lane % PIECES;
#pragma unroll
    for (uint i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
      const PackedMatrix& matrix = matrices[i * ROWS_AT_ONCE / WEIGHT_ROWS];
      const uint row = i * ROWS_AT_ONCE + lane / PIECES;
      const uint from = min(first_row + row % WEIGHT_ROWS, last_row), k = first + piece * PIECE_CODES;
      copy_async(slab + row * ROW_BYTES + (piece ^ swizzle(row)) * 16,
                 matrix.codes + size_t(from) * matrix.codes_stride + k / 2, k < K);
    }
    const uint scale_bytes = min((K - first + GROUP - 1) / GROUP, GROUPS) * 2;
#pragma unroll
    for (uint i = 0; i < (ROWS + SIMD_WIDTH - 1) / SIMD_WIDTH; ++i) {
      const uint row = i * SIMD_WIDTH + lane;
      if (ROWS % SIMD_WIDTH != 0 && row >= ROWS)
        break;
      // A warp may have rows of two matrices.
      const bool second = MATRICES == 2 && row >= WEIGHT_ROWS;
      const PackedMatrix matrix = second ? matrices[MATRICES - 1] : matrices[0];
      const size_t at = size_t(min(first_row + row % WEIGHT_ROWS, last_row)) * matrix.scales_stride + first / GROUP * 2;
      uchar* to = slab + SCALES_AT + row * 2 * SCALE_BYTES;
      copy_scales(to, matrix.scales + at, scale_bytes);
      copy_scales(to + SCALE_BYTES, matrix.biases + at, scale_bytes);
    }
    constexpr uint X_PIECES = SLAB / 8, X_COPIES = X_ROWS * X_PIECES / SIMD_WIDTH;
    static_assert(X_COPIES * SIMD_WIDTH == X_ROWS * X_PIECES);
#pragma unroll
    for (uint i = 0; i < X_COPIES; ++i) {
      const uint row = (i * SIMD_WIDTH + lane) / X_PIECES, at = (i * SIMD_WIDTH + lane) % X_PIECES * 8;
      if (row < count) // what other columns of the sums hold is never looked at
        copy_async(slab + X_AT + row * X_BYTES + at * sizeof(T), x(row) + first + at, first + at < K);
    }
  }

  /// sum += the products of a slab that has arrived.
  METAL_FUNC void multiply_add(const uchar* slab, uint lane) {
    const uint g = lane / 4, t = lane % 4;
    const uchar* own_x = slab + X_AT + (X_ROWS > 1 ? g * X_BYTES : 0) + t * (WORDS * 16);
    const uchar* own_codes = slab + g * ROW_BYTES + t * (WORDS * 4);
    const uchar* own_scales = slab + SCALES_AT + g * 2 * SCALE_BYTES;
    const uint own_place = swizzle(g) * 16;
    const PackedCodes<T> decoded;
    const uint32_t one = __activemask() & PackedCodes<T>::ONES, ones[4] = {one, one, one, one};
    uint32_t scale_words[FRAGMENTS][2][2]; // rows g and g + 8; scales and biases of two groups
#pragma unroll
    for (uint group = 0; group < GROUPS; ++group) {
      uint32_t x[COLUMN_FRAGMENTS][WORDS][4];
      float total[COLUMN_FRAGMENTS][4];
#pragma unroll
      for (uint n = 0; n < COLUMN_FRAGMENTS; ++n)
#pragma unroll
        for (uint w = 0; w < WORDS; ++w) {
          const uint4 eight = *reinterpret_cast<const uint4*>(own_x + n * 8 * X_BYTES + group * GROUP * 2 + w * 16);
          x[n][w][0] = __byte_perm(eight.x, eight.z, 0x5410);
          x[n][w][1] = __byte_perm(eight.x, eight.z, 0x7632);
          x[n][w][2] = __byte_perm(eight.y, eight.w, 0x5410);
          x[n][w][3] = __byte_perm(eight.y, eight.w, 0x7632);
          if (w == 0)
            multiply_fragments(T{}, total[n], ones, x[n][w][0], x[n][w][1]);
          else
            multiply_add_fragments(T{}, total[n], ones, x[n][w][0], x[n][w][1]);
          multiply_add_fragments(T{}, total[n], ones, x[n][w][2], x[n][w][3]);
        }
      // A group's pieces stand together, wherever the swizzle puts them.
      const uchar* codes = own_codes + (group * (WORDS * 16) ^ own_place);
#pragma unroll
      for (uint f = 0; f < FRAGMENTS; ++f) {
        uint32_t upper[WORDS], lower[WORDS];
        load_words(upper, codes + f * 16 * ROW_BYTES);
        load_words(lower, codes + (f * 16 + 8) * ROW_BYTES);
        float part[COLUMN_FRAGMENTS][4];
#pragma unroll
        for (uint w = 0; w < WORDS; ++w) {
          const uint32_t a[4] = {decoded.pair(upper[w], 0), decoded.pair(lower[w], 0), decoded.pair(upper[w], 1),
                                 decoded.pair(lower[w], 1)};
          const uint32_t b[4] = {decoded.pair(upper[w], 2), decoded.pair(lower[w], 2), decoded.pair(upper[w], 3),
                                 decoded.pair(lower[w], 3)};
#pragma unroll
          for (uint n = 0; n < COLUMN_FRAGMENTS; ++n) {
            if (w == 0)
              multiply_fragments(T{}, part[n], a, x[n][w][0], x[n][w][1]);
            else
              multiply_add_fragments(T{}, part[n], a, x[n][w][0], x[n][w][1]);
            multiply_add_fragments(T{}, part[n], b, x[n][w][2], x[n][w][3]);
          }
        }
        if (group % 2 == 0) {
#pragma unroll
          for (uint half_row = 0; half_row < 2; ++half_row)
#pragma unroll
            for (uint bias = 0; bias < 2; ++bias)
              scale_words[f][half_row][bias] = load_scale_word(own_scales + (f * 16 + half_row * 8) * 2 * SCALE_BYTES +
                                                               bias * SCALE_BYTES + group * 2);
        }
#pragma unroll
        for (uint half_row = 0; half_row < 2; ++half_row) {
          const float scale = scale_of(scale_words[f][half_row][0], group % 2);
          const float bias = fmaf(-PackedCodes<T>::OFFSET, scale, scale_of(scale_words[f][half_row][1], group % 2));
#pragma unroll
          for (uint n = 0; n < COLUMN_FRAGMENTS; ++n)
#pragma unroll
            for (uint e = 0; e < (X_ROWS == 1 ? 1 : 2); ++e) { // of one row all columns are alike
              float& to = sum[f][n][2 * half_row + e];
              to = fmaf(bias, total[n][e], fmaf(scale, part[n][2 * half_row + e], to));
            }
        }
      }
    }
  }

  /// to = to + weight * sum, sum = 0.
  METAL_FUNC void add_to(PackedProduct& to, float weight) {
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (uint n = 0; n < COLUMN_FRAGMENTS; ++n)
#pragma unroll
        for (uint e = 0; e < 4; ++e)
          to.sum[f][n][e] = fmaf(weight, sum[f][n][e], to.sum[f][n][e]);
    clear();
  }

  /// Puts the sums of all warps where `at` finds them. All threads take part; slabs are no longer needed.
  METAL_FUNC void gather(uchar* memory, uint warp, uint lane) const {
    __syncthreads();
    float* own = reinterpret_cast<float*>(memory) + warp * (COLUMNS * ROWS);
    const uint g = lane / 4, t = lane % 4;
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (uint n = 0; n < COLUMN_FRAGMENTS; ++n)
#pragma unroll
        for (uint e = 0; e < 4; ++e)
          own[(8 * n + 2 * t + e % 2) * ROWS + f * 16 + g + e / 2 * 8] = sum[f][n][e];
    __syncthreads();
  }

  /// The sum of row `row` of x and weight row `weight_row` of `matrix`, after `gather`.
  METAL_FUNC static float at(const uchar* memory, uint row, uint matrix, uint weight_row) {
    const float* from = reinterpret_cast<const float*>(memory) + row * ROWS + matrix * WEIGHT_ROWS + weight_row;
    float total = from[0];
#pragma unroll
    for (uint warp = 1; warp < WARPS; ++warp)
      total += from[warp * (COLUMNS * ROWS)];
    return total;
  }

  /// Steps of a warp that takes every WARPS-th slab.
  METAL_FUNC static uint steps(uint slabs, uint warp) { return (slabs + WARPS - 1 - warp) / WARPS; }

  /// For every step of a warp: start(slab, step) starts its copies, use(slab, step) finds them arrived.
  template <typename Start, typename Use>
  METAL_FUNC static void for_each_slab(uchar* memory, uint steps, uint warp, const Start& start, const Use& use) {
    const auto slab = [&](uint step) { return memory + (warp * STAGES + step % STAGES) * SLAB_BYTES; };
    // Both calls stand here once: they are most of the kernel.
    for (uint step = 0; step < steps + STAGES; ++step) {
      if (step >= STAGES) {
        copy_wait_own<STAGES - 1>();
        __syncwarp();
        use(slab(step), step - STAGES);
        __syncwarp();
      }
      if (step < steps)
        start(slab(step), step);
      copy_commit(); // also of nothing: the wait counts groups
    }
  }

  /// sum += all of K.
  template <typename X>
  METAL_FUNC void multiply_add_all(uchar* memory, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                   uint last_row, const X& x, uint count, uint K, uint warp, uint lane) {
    for_each_slab(
        memory, steps((K + SLAB - 1) / SLAB, warp), warp,
        [&](uchar* slab, uint step) {
          copy(slab, matrices, first_row, last_row, x, count, (warp + step * WARPS) * SLAB, K, lane);
        },
        [&](const uchar* slab, uint) { multiply_add(slab, lane); });
  }

private:
  /// What a row's pieces are exchanged by, so that the lanes of a load find theirs in different banks: whole groups.
  METAL_FUNC static constexpr uint swizzle(uint row) { return row / LINE_ROWS * WORDS % PIECES; }

  METAL_FUNC static void copy_scales(uchar* to, const uchar* from, uint bytes) {
    if constexpr (SCALE_BYTES >= 4) {
      if (reinterpret_cast<size_t>(from) % SCALE_BYTES == 0) {
        copy_async_part<SCALE_BYTES>(to, from, bytes);
        return;
      }
    }
#pragma unroll
    for (uint i = 0; i < SCALE_BYTES; i += 2)
      *reinterpret_cast<uint16_t*>(to + i) = i < bytes ? *reinterpret_cast<const uint16_t*>(from + i) : uint16_t(0);
  }

  METAL_FUNC static void load_words(uint32_t (&to)[WORDS], const uchar* from) {
    if constexpr (WORDS == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else if constexpr (WORDS == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      to[0] = two.x, to[1] = two.y;
    } else {
      to[0] = *reinterpret_cast<const uint32_t*>(from);
    }
  }

  /// Scales of two groups, or of the one there is.
  METAL_FUNC static uint32_t load_scale_word(const uchar* from) {
    if constexpr (GROUPS == 1)
      return *reinterpret_cast<const uint16_t*>(from);
    else
      return *reinterpret_cast<const uint32_t*>(from);
  }
  METAL_FUNC static float scale_of(uint32_t word, uint second) {
    if constexpr (FP16_SCALES)
      return float(__builtin_bit_cast(half, uint16_t(second ? word >> 16 : word)));
    else
      return __builtin_bit_cast(float, second ? word & 0xFFFF0000u : word << 16);
  }
};

} // namespace metal_sim
