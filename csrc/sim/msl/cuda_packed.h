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
//   sum of (s * code + b) * x = s * fragment + b * total of x - s * OFFSET * total of x
//
// The totals come from a product with ones, and of what they are multiplied by tensor cores make the sum as well:
// scales and biases as they are stored are tf32 numbers, a total is the sum of two. Sums are fp32.
//
// Warps take slabs of K in turn, each with slabs of its own in shared memory: one that is multiplied, others on their
// way; warps with other rows of weights and the same K share rows of x. With one row of x a slab brings its scales, and
// no warp waits for another before the sums are added up. Tiles of rows fetch scales for several slabs of all warps at
// once: a row's scales for one slab are a few bytes of a sector.
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

  /// The widest copies of scales and biases, up to 16 bytes, that their addresses allow.
  METAL_FUNC uint scale_width() const {
    const uint all =
        uint(reinterpret_cast<size_t>(scales)) | uint(reinterpret_cast<size_t>(biases)) | scales_stride | 16;
    return all & (0 - all);
  }
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

/// MATRICES matrices of WEIGHT_ROWS rows each, a multiple of 16, times X_ROWS rows of x: 1, 8 or 16. So many are those
/// of K_WARPS warps, which share K; others of the WARPS have the rows that follow. GROUP: columns of a scale;
/// FP16_SCALES: they are fp16, else bf16. STAGES: slabs of a warp at a time. CHUNK_STEPS: scales are fetched for so
/// many steps of all warps at once; 0: by each warp for its slab.
template <typename T, uint GROUP, bool FP16_SCALES, uint MATRICES, uint WEIGHT_ROWS, uint X_ROWS, uint SLAB, uint WARPS,
          uint K_WARPS, uint STAGES, uint CHUNK_STEPS>
struct PackedProduct {
  static constexpr uint ROWS = MATRICES * WEIGHT_ROWS, FRAGMENTS = ROWS / 16;
  static constexpr uint COLUMN_FRAGMENTS = (X_ROWS + 7) / 8, COLUMNS = 8 * COLUMN_FRAGMENTS;
  static constexpr uint PIECE_CODES = 32;            // of 16 bytes
  static constexpr uint PIECES = SLAB / PIECE_CODES; // of a row
  static constexpr uint WORDS = GROUP / PIECE_CODES; // of a lane, of a row of a group; also a group's pieces
  static constexpr uint GROUPS = SLAB / GROUP;
  static constexpr uint LINE_ROWS = 8 / PIECES; // of all banks
  static constexpr uint ROW_BYTES = SLAB / 2, SCALE_BYTES = 2 * GROUPS;
  static constexpr uint CHUNK_BYTES = CHUNK_STEPS ? CHUNK_STEPS * K_WARPS * SCALE_BYTES : SCALE_BYTES; // of a row
  static constexpr uint SCALE_ROW = 2 * CHUNK_BYTES; // its scales, then its biases
  static constexpr uint X_BYTES = SLAB * sizeof(T);
  static constexpr uint SCALES_AT = ROWS * ROW_BYTES;
  static constexpr uint SLAB_BYTES = SCALES_AT + (CHUNK_STEPS ? 0 : ROWS * SCALE_ROW);
  static constexpr uint X_SLAB_BYTES = X_ROWS * X_BYTES, X_AT = WARPS * STAGES * SLAB_BYTES;
  /// Warps with the same K.
  static constexpr uint N_WARPS = WARPS / K_WARPS;
  static constexpr uint CHUNKS_AT = X_AT + K_WARPS * STAGES * X_SLAB_BYTES;
  static constexpr uint COPY_BYTES = CHUNKS_AT + (CHUNK_STEPS ? 2 * N_WARPS * ROWS * SCALE_ROW : 0);
  /// Of a warp, gathered: of one row all columns are alike; of more, four words keep those of a store in different
  /// banks.
  static constexpr uint SUM_ROWS = X_ROWS > 1 ? COLUMNS : 1, SUM_STRIDE = X_ROWS > 1 ? ROWS + 4 : ROWS;
  static constexpr uint SUMS = SUM_ROWS * SUM_STRIDE, SUM_BYTES = WARPS * SUMS * 4;
  /// Of shared memory.
  static constexpr uint BYTES = COPY_BYTES > SUM_BYTES ? COPY_BYTES : SUM_BYTES;
  static_assert(sizeof(T) == 2 && PIECES >= WORDS && 8 % PIECES == 0 && WEIGHT_ROWS % 16 == 0 && SLAB_BYTES % 16 == 0);
  static_assert(CHUNK_STEPS != 1, "a chunk's place is free again when all warps use the next one");

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

  /// Lanes that copy pieces of 16 bytes of a row of x at a time: whole lines of memory where rows are several.
  static constexpr uint X_LANES = X_ROWS > 1   ? (N_WARPS * 32 / X_ROWS > 4 ? N_WARPS * 32 / X_ROWS : 4)
                                  : SLAB < 256 ? SLAB / 8
                                               : 32;
  static constexpr uint X_ROWS_AT_ONCE = X_ROWS > 1 ? N_WARPS * 32 / X_LANES : 1;
  static_assert(SLAB % (8 * X_LANES) == 0);

  /// Where the rows of x begin of which a lane copies parts, `count` in all; beyond those: anywhere.
  struct OwnRows {
    static constexpr uint COUNT = (X_ROWS + X_ROWS_AT_ONCE - 1) / X_ROWS_AT_ONCE;
    const T* row[COUNT];
    uint count;

    /// Of rows that begin at x(row). `lane`: among those of all warps that share them.
    template <typename X>
    METAL_FUNC OwnRows(const X& x, uint count, uint lane) : count(count) {
#pragma unroll
      for (uint i = 0; i < COUNT; ++i) {
        const uint own = i * X_ROWS_AT_ONCE + lane / X_LANES;
        row[i] = x(own < count ? own : 0);
      }
    }
  };

  /// Starts copying K first .. first + SLAB - 1 of weight rows first_row .. last_row. What stands in place of other
  /// codes makes no difference to the sums that are looked at.
  METAL_FUNC static void copy_codes(uchar* slab, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                    uint last_row, uint first, uint K, uint lane) {
    if (first + SLAB <= K && first_row + WEIGHT_ROWS <= last_row + 1)
      copy_code_pieces<true>(slab, matrices, first_row, last_row, first, K, lane);
    else
      copy_code_pieces<false>(slab, matrices, first_row, last_row, first, K, lane);
  }

  /// The same of rows of x, whose columns beyond K are zeros.
  METAL_FUNC static void copy_rows(uchar* to, const OwnRows& x, uint first, uint K, uint lane) {
    if (first + SLAB <= K)
      copy_row_pieces<true>(to, x, first, K, lane);
    else
      copy_row_pieces<false>(to, x, first, K, lane);
  }

  /// Starts copying the scales and biases of a chunk of columns that begins with `first`, by THREADS threads. What is
  /// beyond K is zeros.
  template <uint THREADS>
  METAL_FUNC static void copy_scales(uchar* to, const PackedMatrix (&matrices)[MATRICES], uint first_row, uint last_row,
                                     uint first, uint K, uint thread_index) {
    // What follows is done anew each time: kept in registers, the addresses of all widths would be most of them.
    thread_index = unknown(thread_index);
    const uint width = min(matrices[0].scale_width(), matrices[MATRICES - 1].scale_width());
    const auto copy_by = [&](auto size) {
      copy_scales_by<decltype(size)::BYTES, THREADS>(to, matrices, first_row, last_row, first, K, thread_index);
    };
    if (CHUNK_BYTES >= 16 && width >= 16)
      copy_by(CopySize<16>{});
    else if (CHUNK_BYTES >= 8 && width >= 8)
      copy_by(CopySize<8>{});
    else if (CHUNK_BYTES >= 4 && width >= 4)
      copy_by(CopySize<4>{});
    else
      copy_by(CopySize<2>{});
  }

  /// sum += the products of a slab and rows of x that have arrived, of USED fragments of them. `at`: where in rows of
  /// `scales` those of the slab begin.
  template <uint USED = COLUMN_FRAGMENTS>
  METAL_FUNC void multiply_add(const uchar* slab, const uchar* x_rows, const uchar* scales, uint at, uint lane) {
    // Fragments whose products take turns: each waits for the one before it.
    constexpr uint TOGETHER = USED == 1 && FRAGMENTS % 2 == 0 ? 2 : 1;
    const uint g = lane / 4, t = lane % 4;
    const uchar* own_x = x_rows + (X_ROWS > 1 ? g * X_BYTES : 0);
    const uint own_x_piece = t * WORDS ^ x_swizzle(g);
    const uchar* own_codes = slab + g * ROW_BYTES + t * (WORDS * 4);
    const uchar* own_scales = scales + g * SCALE_ROW + scale_place(g, at);
    const uint own_place = swizzle(g) * 16;
    const PackedCodes<T> decoded;
    const uint32_t one = __activemask() & PackedCodes<T>::ONES, ones[4] = {one, one, one, one};
    float total[GROUPS][USED][4];       // elements 0 and 1: of rows 2t and 2t + 1 of x
    uint32_t scale_words[FRAGMENTS][2]; // rows g and g + 8; scales of two groups
#pragma unroll
    for (uint group = 0; group < GROUPS; ++group) {
      uint32_t x[USED][WORDS][4];
#pragma unroll
      for (uint n = 0; n < USED; ++n)
#pragma unroll
        for (uint w = 0; w < WORDS; ++w) {
          const uint piece = own_x_piece ^ (group * 4 * WORDS + w);
          const uint4 eight = *reinterpret_cast<const uint4*>(own_x + n * 8 * X_BYTES + piece * 16);
          x[n][w][0] = __byte_perm(eight.x, eight.z, 0x5410);
          x[n][w][1] = __byte_perm(eight.x, eight.z, 0x7632);
          x[n][w][2] = __byte_perm(eight.y, eight.w, 0x5410);
          x[n][w][3] = __byte_perm(eight.y, eight.w, 0x7632);
          if (w == 0)
            multiply_fragments(T{}, total[group][n], ones, x[n][w][0], x[n][w][1]);
          else
            multiply_add_fragments(T{}, total[group][n], ones, x[n][w][0], x[n][w][1]);
          multiply_add_fragments(T{}, total[group][n], ones, x[n][w][2], x[n][w][3]);
        }
      // A group's pieces stand together, wherever the swizzle puts them.
      const uchar* codes = own_codes + (group * (WORDS * 16) ^ own_place);
#pragma unroll
      for (uint first = 0; first < FRAGMENTS; first += TOGETHER) {
        uint32_t upper[TOGETHER][WORDS], lower[TOGETHER][WORDS];
        float part[TOGETHER][USED][4];
#pragma unroll
        for (uint i = 0; i < TOGETHER; ++i) {
          load_words(upper[i], codes + (first + i) * 16 * ROW_BYTES);
          load_words(lower[i], codes + ((first + i) * 16 + 8) * ROW_BYTES);
        }
#pragma unroll
        for (uint w = 0; w < WORDS; ++w)
#pragma unroll
          for (uint pairs = 0; pairs < 4; pairs += 2)
#pragma unroll
            for (uint i = 0; i < TOGETHER; ++i) {
              const uint32_t a[4] = {decoded.pair(upper[i][w], pairs), decoded.pair(lower[i][w], pairs),
                                     decoded.pair(upper[i][w], pairs + 1), decoded.pair(lower[i][w], pairs + 1)};
#pragma unroll
              for (uint n = 0; n < USED; ++n) {
                if (w == 0 && pairs == 0)
                  multiply_fragments(T{}, part[i][n], a, x[n][w][pairs], x[n][w][pairs + 1]);
                else
                  multiply_add_fragments(T{}, part[i][n], a, x[n][w][pairs], x[n][w][pairs + 1]);
              }
            }
#pragma unroll
        for (uint i = 0; i < TOGETHER; ++i)
#pragma unroll
          for (uint half_row = 0; half_row < 2; ++half_row) {
            uint32_t& word = scale_words[first + i][half_row];
            if (group % 2 == 0)
              word = load_scale_word(own_scales + ((first + i) * 16 + half_row * 8) * SCALE_ROW + group * 2);
            const float scale = scale_of(word, group % 2);
#pragma unroll
            for (uint n = 0; n < USED; ++n)
#pragma unroll
              for (uint e = 0; e < (X_ROWS == 1 ? 1 : 2); ++e) { // of one row all columns are alike
                float& to = sum[first + i][n][2 * half_row + e];
                to = fmaf(scale, part[i][n][2 * half_row + e], to);
              }
          }
      }
    }
    add_offsets(scales, at, total, lane);
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
    float* own = reinterpret_cast<float*>(memory) + warp * SUMS;
    const uint g = lane / 4, t = lane % 4;
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (uint n = 0; n < COLUMN_FRAGMENTS; ++n)
#pragma unroll
        for (uint e = 0; e < 4; ++e)
          if (X_ROWS > 1 || (t == 0 && e % 2 == 0))
            own[(8 * n + 2 * t + e % 2) * SUM_STRIDE + f * 16 + g + e / 2 * 8] = sum[f][n][e];
    __syncthreads();
  }

  /// The sum of row `row` of x and weight row `weight_row` of `matrix`, of all warps' rows, after `gather`.
  METAL_FUNC static float at(const uchar* memory, uint row, uint matrix, uint weight_row) {
    const float* from = reinterpret_cast<const float*>(memory) + weight_row / WEIGHT_ROWS * (K_WARPS * SUMS) +
                        row * SUM_STRIDE + matrix * WEIGHT_ROWS + weight_row % WEIGHT_ROWS;
    float total = from[0];
#pragma unroll
    for (uint warp = 1; warp < K_WARPS; ++warp)
      total += from[warp * SUMS];
    return total;
  }

  /// Steps of a warp that takes every K_WARPS-th slab.
  METAL_FUNC static uint steps(uint slabs, uint warp) { return (slabs + K_WARPS - 1 - warp) / K_WARPS; }

  /// For every step of a warp: start_weights(slab, step) and start_rows(x, step) start its copies, use(slab, x, step)
  /// finds them arrived. WAITS: wait() is called once ahead of start_rows, when as many weights are on their way as
  /// there is room for.
  template <bool WAITS, typename StartWeights, typename Wait, typename StartRows, typename Use>
  METAL_FUNC static void for_each_slab(uchar* memory, uint steps, uint warp, const StartWeights& start_weights,
                                       const Wait& wait, const StartRows& start_rows, const Use& use) {
    const auto slab = [&](uint step) { return memory + (warp * STAGES + step % STAGES) * SLAB_BYTES; };
    const auto x = [&](uint step) { return memory + X_AT + (warp % K_WARPS * STAGES + step % STAGES) * X_SLAB_BYTES; };
    if constexpr (WAITS) {
      for (uint step = 0; step < min(steps, STAGES); ++step)
        start_weights(slab(step), step);
      wait();
    }
    for (uint step = 0; step < steps + STAGES; ++step) {
      if (step >= STAGES) {
        copy_wait_own<STAGES - 1>();
        meet(warp);
        use(slab(step), x(step), step - STAGES);
        meet(warp);
      }
      if (step < steps) {
        if (!WAITS || step >= STAGES)
          start_weights(slab(step), step);
        start_rows(x(step), step);
      }
      copy_commit(); // also of nothing: the wait counts groups
    }
  }

  /// sum += all of K, of `count` rows that begin at x(row).
  template <typename X>
  METAL_FUNC void multiply_add_all(uchar* memory, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                   uint last_row, const X& x, uint count, uint K, uint warp, uint lane) {
    const uint slabs = (K + SLAB - 1) / SLAB;
    const uint x_lane = warp / K_WARPS * SIMD_WIDTH + lane; // of the warps that share rows
    const OwnRows own_x(x, count, x_lane);
    const uint k_warp = warp % K_WARPS;
    first_row += warp / K_WARPS * WEIGHT_ROWS;
    const auto chunk = [&](uint step) {
      const uint place = warp / K_WARPS * 2 + step / max(CHUNK_STEPS, 1u) % 2;
      return memory + CHUNKS_AT + place * (ROWS * SCALE_ROW);
    };
    // All warps take as many steps where they share chunks.
    for_each_slab<false>(
        memory, steps(slabs, CHUNK_STEPS ? 0 : k_warp), warp,
        [&](uchar* slab, uint step) {
          const uint index = k_warp + step * K_WARPS;
          if (CHUNK_STEPS == 0 || index < slabs)
            copy_codes(slab, matrices, first_row, last_row, index * SLAB, K, lane);
          if constexpr (CHUNK_STEPS == 0)
            copy_scales<SIMD_WIDTH>(slab + SCALES_AT, matrices, first_row, last_row, index * SLAB, K, lane);
          else if (step % CHUNK_STEPS == 0)
            copy_scales<K_WARPS * SIMD_WIDTH>(chunk(step), matrices, first_row, last_row, step * K_WARPS * SLAB, K,
                                              k_warp * SIMD_WIDTH + lane);
        },
        [] {},
        [&](uchar* to, uint step) {
          if (CHUNK_STEPS == 0 || k_warp + step * K_WARPS < slabs)
            copy_rows(to, own_x, (k_warp + step * K_WARPS) * SLAB, K, x_lane);
        },
        [&](const uchar* slab, const uchar* x_rows, uint step) {
          if constexpr (CHUNK_STEPS == 0) {
            multiply_add(slab, x_rows, slab + SCALES_AT, 0, lane);
          } else {
            if (step % CHUNK_STEPS == 0)
              __syncthreads();
            if (k_warp + step * K_WARPS >= slabs)
              return;
            const uint at = (step % CHUNK_STEPS * K_WARPS + k_warp) * SCALE_BYTES;
            if (COLUMN_FRAGMENTS > 1 && count <= 8) // one fragment has them
              multiply_add<1>(slab, x_rows, chunk(step), at, lane);
            else
              multiply_add(slab, x_rows, chunk(step), at, lane);
          }
        });
  }

private:
  template <uint SIZE>
  struct CopySize {
    static constexpr uint BYTES = SIZE;
  };

  /// The warps that share rows of x wait for each other.
  METAL_FUNC static void meet(uint warp) {
    if constexpr (N_WARPS == 1)
      __syncwarp();
    else
      barrier_of(1 + warp % K_WARPS, N_WARPS * SIMD_WIDTH); // 0 is that of all threads
  }

  /// What a row's pieces are exchanged by, so that the lanes of a load find theirs in different banks: whole groups.
  METAL_FUNC static constexpr uint swizzle(uint row) { return row / LINE_ROWS * WORDS % PIECES; }
  /// Likewise of x, of whose rows a load has two at a time, in pieces of 16 bytes: any of the eight.
  METAL_FUNC static constexpr uint x_swizzle(uint row) { return X_ROWS > 1 ? row % 2 * 5 : 0; }
  /// Where in a row of scales byte `byte` stands, likewise.
  METAL_FUNC static constexpr uint scale_place(uint row, uint byte) {
    constexpr uint SCALE_PIECES = SCALE_ROW > 16 ? SCALE_ROW / 16 : 1;
    static_assert(8 % SCALE_PIECES == 0);
    return byte ^ row / (8 / SCALE_PIECES) % SCALE_PIECES * 16;
  }

  /// WHOLE: all rows and columns are there. Places repeat after eight rows: what differs is constant.
  template <bool WHOLE>
  METAL_FUNC static void copy_code_pieces(uchar* slab, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                          uint last_row, uint first, uint K, uint lane) {
    const uint piece = lane % PIECES, row = lane / PIECES, k = first + piece * PIECE_CODES;
    const auto copy = [&](auto at) {
      constexpr uint M = decltype(at)::AT / WEIGHT_ROWS, I = decltype(at)::AT % WEIGHT_ROWS;
      const PackedMatrix matrix = matrices[M];
      const uchar* from = matrix.codes + size_t(first_row + row) * matrix.codes_stride + k / 2;
      copy_async_at<decltype(at)::AT * ROW_BYTES, 0>(slab + row * ROW_BYTES + (piece ^ swizzle(row + I % 8)) * 16,
                                                     from + size_t(I) * matrix.codes_stride,
                                                     WHOLE || (k < K && first_row + row + I <= last_row));
    };
    for_each_place<0, ROWS, SIMD_WIDTH / PIECES>(copy);
  }

  template <bool WHOLE>
  METAL_FUNC static void copy_row_pieces(uchar* to, const OwnRows& x, uint first, uint K, uint lane) {
#pragma unroll
    for (uint n = 0; n < OwnRows::COUNT; ++n) {
      const uint row = n * X_ROWS_AT_ONCE + lane / X_LANES, own = lane % X_LANES;
      if (row >= X_ROWS)
        continue;
      const T* from = x.row[n] + first + own * 8;
      const auto copy = [&](auto at) {
        constexpr uint I = decltype(at)::AT;
        uchar* place = to + row * X_BYTES + (I % 8 ^ own ^ x_swizzle(row)) * 16;
        if constexpr (WHOLE)
          copy_async_at<I / 8 * 128, I * 16>(place, from, row < x.count); // sums of other rows are not looked at
        else
          copy_async(place + I / 8 * 128, from + I * 8, row < x.count && first + (I + own) * 8 < K);
      };
      for_each_place<0, SLAB / 8, X_LANES>(copy);
    }
  }

  template <uint WIDTH, uint THREADS>
  METAL_FUNC static void copy_scales_by(uchar* to, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                        uint last_row, uint first, uint K, uint thread_index) {
    constexpr uint COPIES = (CHUNK_BYTES + WIDTH - 1) / WIDTH; // of a row's scales
    constexpr uint AT_ONCE = THREADS / (2 * COPIES);           // rows: a thread has the same part of all of its own
    static_assert(THREADS % (2 * COPIES) == 0 && AT_ONCE > 0);
    const uint own = thread_index / (2 * COPIES), at = thread_index % COPIES * WIDTH;
    const bool bias = thread_index / COPIES % 2;
    const uint bytes = min((K - first + GROUP - 1) / GROUP * 2, CHUNK_BYTES),
               count = at < bytes ? min(bytes - at, WIDTH) : 0;
    const auto copy = [&](auto place) {
      const uint row = decltype(place)::AT + own;
      if (ROWS % AT_ONCE != 0 && row >= ROWS)
        return;
      // By value and by a constant: they are registers.
      const bool second = WEIGHT_ROWS % AT_ONCE == 0 ? decltype(place)::AT >= WEIGHT_ROWS : row >= WEIGHT_ROWS;
      const PackedMatrix matrix = second ? matrices[MATRICES - 1] : matrices[0];
      const uchar* from = (bias ? matrix.biases : matrix.scales) +
                          size_t(min(first_row + row % WEIGHT_ROWS, last_row)) * matrix.scales_stride +
                          first / GROUP * 2 + at;
      uchar* to_row = to + row * SCALE_ROW + scale_place(row, (bias ? CHUNK_BYTES : 0) + at);
      if constexpr (WIDTH == 2)
        *reinterpret_cast<uint16_t*>(to_row) = count ? *reinterpret_cast<const uint16_t*>(from) : uint16_t(0);
      else
        copy_async_part<WIDTH>(to_row, from, count);
    };
    for_each_place<0, ROWS, AT_ONCE>(copy);
  }

  /// function(Place<at>) for at = AT, AT + STEP, ... below END: constants, of which offsets in instructions can be
  /// made.
  template <uint AT_>
  struct Place {
    static constexpr uint AT = AT_;
  };
  template <uint AT, uint END, uint STEP, typename Function>
  METAL_FUNC static void for_each_place(const Function& function) {
    function(Place<AT>{});
    if constexpr (AT + STEP < END)
      for_each_place<AT + STEP, END, STEP>(function);
  }

  /// sum += the products of scales and biases with totals, of all groups of a slab: by two a tf32 product over scales,
  /// then biases of both groups, with the totals' high parts, and another with what those leave.
  template <uint USED>
  METAL_FUNC void add_offsets(const uchar* scales, uint at, const float (&total)[GROUPS][USED][4], uint lane) {
    const uint g = lane / 4, t = lane % 4, second = GROUPS > 1 ? t % 2 : 0;
    const uchar* own = scales + g * SCALE_ROW + scale_place(g, t / 2 * CHUNK_BYTES + at) + second * 2;
    // The second factor's element is of row g of x and group t % 2. All lanes of a t hold the same totals: each gives
    // what its g says, of rows its bit 0, of groups its bit 1.
    const uint from_lane = (t % 2 * 2 + g % 2) * 4 + g / 2;
#pragma unroll
    for (uint group = 0; group < GROUPS; group += 2) {
      uint32_t high[USED], low[USED];
#pragma unroll
      for (uint n = 0; n < USED; ++n) {
        const float (&first)[4] = total[group][n];
        float value = g % 2 ? first[1] : first[0];
        if constexpr (GROUPS > 1) {
          const float (&other)[4] = total[group + 1][n];
          value = g / 2 % 2 ? (g % 2 ? other[1] : other[0]) : value;
        } else {
          value = g / 2 % 2 ? 0.0f : value;
        }
        value = __shfl_sync(~0u, value, from_lane) * (t < 2 ? -PackedCodes<T>::OFFSET : 1.0f);
        high[n] = __builtin_bit_cast(uint32_t, value) & 0xFFFFE000u;
        low[n] = __builtin_bit_cast(uint32_t, value - __builtin_bit_cast(float, high[n]));
      }
#pragma unroll
      for (uint f = 0; f < FRAGMENTS; ++f) {
        uint32_t half_rows[2];
#pragma unroll
        for (uint half_row = 0; half_row < 2; ++half_row) {
          const uchar* from = own + (f * 16 + half_row * 8) * SCALE_ROW + group * 2;
          half_rows[half_row] = __builtin_bit_cast(uint32_t, scale_of(*reinterpret_cast<const uint16_t*>(from), 0));
        }
#pragma unroll
        for (uint n = 0; n < USED; ++n) {
          multiply_add_tf32(sum[f][n], half_rows, high[n]);
          multiply_add_tf32(sum[f][n], half_rows, low[n]);
        }
      }
    }
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
