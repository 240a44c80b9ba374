// Slabs of weights of 4-bit affine codes in shared memory: so many columns of a warp's weight rows, copied along the
// rows, with their scales and biases.
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

/// MATRICES matrices of WEIGHT_ROWS rows each, a multiple of 16; SLAB columns. GROUP: columns of a scale; FP16_SCALES:
/// they are fp16, else bf16. CHUNK_BYTES: of a row's scales that are copied at once.
template <uint GROUP, bool FP16_SCALES, uint MATRICES, uint WEIGHT_ROWS, uint SLAB, uint CHUNK_BYTES>
struct PackedSlab {
  static constexpr uint ROWS = MATRICES * WEIGHT_ROWS, FRAGMENTS = ROWS / 16;
  static constexpr uint PIECE_CODES = 32;            // of 16 bytes
  static constexpr uint PIECES = SLAB / PIECE_CODES; // of a row
  static constexpr uint WORDS = GROUP / PIECE_CODES; // of a lane, of a row of a group; also a group's pieces
  static constexpr uint GROUPS = SLAB / GROUP;
  static constexpr uint LINE_ROWS = 8 / PIECES;             // of all banks
  static constexpr uint ROWS_AT_ONCE = SIMD_WIDTH / PIECES; // of a warp's copy
  static constexpr uint ROW_BYTES = SLAB / 2, CODE_BYTES = ROWS * ROW_BYTES;
  static constexpr uint SCALE_ROW = 2 * CHUNK_BYTES; // its scales, then its biases
  static_assert(PIECES >= WORDS && 8 % PIECES == 0 && WEIGHT_ROWS % 16 == 0);

  /// Starts copying K first .. first + SLAB - 1 of weight rows first_row .. last_row. What stands in place of other
  /// codes makes no difference to the sums that are looked at.
  METAL_FUNC static void copy_codes(uchar* slab, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                    uint last_row, uint first, uint K, uint lane) {
    if (first + SLAB <= K && first_row + WEIGHT_ROWS <= last_row + 1)
      copy_code_pieces<true>(slab, matrices, first_row, last_row, first, K, lane);
    else
      copy_code_pieces<false>(slab, matrices, first_row, last_row, first, K, lane);
  }

  /// Copies of a slab's codes that are started a few rows at a time.
  struct CodeCopies {
    const PackedMatrix (&matrices)[MATRICES];
    bool wanted = false;
    const uchar* from[MATRICES]; // of a lane, of the first rows
    uchar* to;

    /// For what copy_codes copies, if all rows and columns are there; else `wanted` is false, and nothing is copied.
    METAL_FUNC void prepare(uchar* slab, uint first_row, uint last_row, uint first, uint K, uint lane) {
      const uint piece = lane % PIECES, row = lane / PIECES;
      wanted = first + SLAB <= K && first_row + WEIGHT_ROWS <= last_row + 1;
#pragma unroll
      for (uint m = 0; m < MATRICES; ++m)
        from[m] =
            matrices[m].codes + size_t(first_row + row) * matrices[m].codes_stride + (first + piece * PIECE_CODES) / 2;
      to = slab + row * ROW_BYTES + (piece ^ swizzle(row)) * 16;
    }
    /// Starts those of COUNT rows from `row` on, all of one matrix, multiples of 16.
    template <uint COUNT>
    METAL_FUNC void start(uint row) const {
      static_assert(ROWS_AT_ONCE % 8 == 0, "places repeat after eight rows");
      const uint m = row / WEIGHT_ROWS;
#pragma unroll
      for (uint at = 0; at < COUNT; at += ROWS_AT_ONCE)
        copy_async_at<0, 0>(to + (row + at) * ROW_BYTES,
                            from[m] + size_t(row % WEIGHT_ROWS + at) * matrices[m].codes_stride, wanted);
    }
  };

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

  /// What a row's pieces are exchanged by, so that the lanes of a load find theirs in different banks: whole groups.
  METAL_FUNC static constexpr uint swizzle(uint row) { return row / LINE_ROWS * WORDS % PIECES; }
  /// Where in a row of scales byte `byte` stands, likewise.
  METAL_FUNC static constexpr uint scale_place(uint row, uint byte) {
    constexpr uint SCALE_PIECES = SCALE_ROW > 128 ? 8 : SCALE_ROW > 16 ? SCALE_ROW / 16 : 1; // of all banks
    static_assert(8 % SCALE_PIECES == 0);
    return byte ^ row / (8 / SCALE_PIECES) % SCALE_PIECES * 16;
  }

  /// A lane's words of a group of a row.
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
  /// Of two neighbouring scales or biases in a word the first or the second.
  METAL_FUNC static float scale_of(uint32_t word, uint second) {
    if constexpr (FP16_SCALES)
      return float(__builtin_bit_cast(half, uint16_t(second ? word >> 16 : word)));
    else
      return __builtin_bit_cast(float, second ? word & 0xFFFF0000u : word << 16);
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

private:
  template <uint SIZE>
  struct CopySize {
    static constexpr uint BYTES = SIZE;
  };

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
    for_each_place<0, ROWS, ROWS_AT_ONCE>(copy);
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
};

} // namespace metal_sim
