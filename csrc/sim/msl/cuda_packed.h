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
// Tensor cores make the totals, of x as the first factor and ones, and the products with them as well: a bf16 scale is
// an operand as it is stored, and a total the sum of three; an fp16 scale is a tf32 number, a total the sum of two.
// Sums are fp32.
//
// Warps take slabs of K in turn, each with slabs of its own in shared memory: one that is multiplied, others on their
// way; warps with other rows of weights and the same K share rows of x. Scales are fetched for several slabs of all
// warps at once: a row's scales for one slab are a few bytes of a sector. One row of x: see cuda_packed_row.h.
#pragma once

#include "cuda_packed_slab.h"

namespace metal_sim {

/// What a pair of codes is decoded as: OFFSET + code, both exact. The mask is in a register: as a constant the compiler
/// would make it anew for each pair.
template <typename T>
struct PackedCodes;
template <>
struct PackedCodes<half> {
  static constexpr float OFFSET = 64.0f;
  static constexpr uint32_t NEGATIVE_OFFSETS = 0xC280C280u; // two of -OFFSET, bf16
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
  static constexpr uint32_t NEGATIVE_OFFSETS = 0xC300C300u;
  static constexpr uint32_t ONES = 0x3F803F80u;
  uint32_t mask = __activemask() & 0x000F000Fu;

  METAL_FUNC uint32_t pair(uint32_t word, uint i) const { return and_or(word >> 4 * i, mask, 0x43004300u); }
};

/// Slabs of weights (cuda_packed_slab.h) times X_ROWS rows of x: 8 or 16. WEIGHT_ROWS are those of K_WARPS warps, which
/// share K; others of the WARPS have the rows that follow. STAGES: slabs of a warp at a time. CHUNK_STEPS: scales are
/// fetched for so many steps of all warps at once.
template <typename T, uint GROUP, bool FP16_SCALES, uint MATRICES, uint WEIGHT_ROWS, uint X_ROWS, uint SLAB, uint WARPS,
          uint K_WARPS, uint STAGES, uint CHUNK_STEPS>
struct PackedProduct
    : PackedSlab<GROUP, FP16_SCALES, MATRICES, WEIGHT_ROWS, SLAB, CHUNK_STEPS * K_WARPS * (2 * SLAB / GROUP)> {
  using Slab = PackedSlab<GROUP, FP16_SCALES, MATRICES, WEIGHT_ROWS, SLAB, CHUNK_STEPS * K_WARPS * (2 * SLAB / GROUP)>;
  using Slab::CODE_BYTES, Slab::FRAGMENTS, Slab::GROUPS, Slab::ROW_BYTES, Slab::ROWS, Slab::SCALE_ROW, Slab::WORDS;
  using Slab::load_scale_word, Slab::load_words, Slab::scale_of, Slab::scale_place, Slab::swizzle;
  static constexpr uint COLUMN_FRAGMENTS = X_ROWS / 8, SCALE_BYTES = 2 * GROUPS, CHUNK_BYTES = SCALE_ROW / 2;
  static constexpr uint X_BYTES = SLAB * sizeof(T), X_SLAB_BYTES = X_ROWS * X_BYTES;
  static constexpr uint X_AT = WARPS * STAGES * CODE_BYTES;
  /// Warps with the same K.
  static constexpr uint N_WARPS = WARPS / K_WARPS;
  static constexpr uint CHUNKS_AT = X_AT + K_WARPS * STAGES * X_SLAB_BYTES;
  static constexpr uint COPY_BYTES = CHUNKS_AT + 2 * N_WARPS * ROWS * SCALE_ROW;
  /// Of a warp, gathered; four words keep those of a store in different banks.
  static constexpr uint SUM_STRIDE = ROWS + 4, SUMS = X_ROWS * SUM_STRIDE, SUM_BYTES = WARPS * SUMS * 4;
  /// Of shared memory.
  static constexpr uint BYTES = COPY_BYTES > SUM_BYTES ? COPY_BYTES : SUM_BYTES;
  static_assert(sizeof(T) == 2 && X_ROWS % 8 == 0);
  static_assert(CHUNK_STEPS > 1, "a chunk's place is free again when all warps use the next one");

  /// Whether the next slab's codes are copied in among a slab's products, to the rows of so many fragments at a time,
  /// and not behind them, where each copy waits for the one before it. The smaller forms have no registers for it.
  static constexpr bool REFILLS = FRAGMENTS >= 8 && COLUMN_FRAGMENTS > 1;
  static constexpr uint REFILL_FRAGMENTS = 2;

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

  /// Lanes that copy pieces of 16 bytes of a row of x at a time: whole lines of memory.
  static constexpr uint X_LANES = N_WARPS * 32 / X_ROWS > 4 ? N_WARPS * 32 / X_ROWS : 4;
  static constexpr uint X_ROWS_AT_ONCE = N_WARPS * 32 / X_LANES;
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

  /// Starts copying K first .. first + SLAB - 1 of rows of x, whose columns beyond K are zeros.
  METAL_FUNC static void copy_rows(uchar* to, const OwnRows& x, uint first, uint K, uint lane) {
    if (first + SLAB <= K)
      copy_row_pieces<true>(to, x, first, K, lane);
    else
      copy_row_pieces<false>(to, x, first, K, lane);
  }

  /// sum += the products of a slab and rows of x that have arrived, of USED fragments of them. `at`: where in rows of
  /// `scales` those of the slab begin. refill(f): the codes of fragments f to f + REFILL_FRAGMENTS - 1 have been read,
  /// by all lanes, since their products have begun.
  template <uint USED = COLUMN_FRAGMENTS, typename Refill>
  METAL_FUNC void multiply_add(const uchar* slab, const uchar* x_rows, const uchar* scales, uint at,
                               const Refill& refill, uint lane) {
    // Fragments whose products take turns: each waits for the one before it.
    constexpr uint TOGETHER = USED == 1 && FRAGMENTS % 2 == 0 ? 2 : 1;
    static_assert(REFILL_FRAGMENTS % TOGETHER == 0);
    const uint g = lane / 4, t = lane % 4;
    const uchar* own_x = x_rows + g * X_BYTES;
    const uint own_x_piece = t * WORDS ^ x_swizzle(g);
    const uchar* own_codes = slab + g * ROW_BYTES + t * (WORDS * 4);
    const uchar* own_scales = scales + g * SCALE_ROW + scale_place(g, at);
    const uint own_place = swizzle(g) * 16;
    const PackedCodes<T> decoded;
    const uint32_t one = __activemask() & PackedCodes<T>::ONES;
    float total[GROUPS][USED];          // of row g of each fragment of x
    uint32_t scale_words[FRAGMENTS][2]; // rows g and g + 8; scales of two groups
#pragma unroll
    for (uint group = 0; group < GROUPS; ++group) {
      uint32_t x[USED][WORDS][4];
#pragma unroll
      for (uint n = 0; n < USED; ++n) {
        float halves[4]; // of row g's total, in elements 0 and 2
#pragma unroll
        for (uint w = 0; w < WORDS; ++w) {
          const uint piece = own_x_piece ^ (group * 4 * WORDS + w);
          const uint4 eight = *reinterpret_cast<const uint4*>(own_x + n * 8 * X_BYTES + piece * 16);
          x[n][w][0] = __byte_perm(eight.x, eight.z, 0x5410);
          x[n][w][1] = __byte_perm(eight.x, eight.z, 0x7632);
          x[n][w][2] = __byte_perm(eight.y, eight.w, 0x5410);
          x[n][w][3] = __byte_perm(eight.y, eight.w, 0x7632);
          // As a first factor its rows g and g + 8 are halves of row g of x.
          if (w == 0)
            multiply_fragments(T{}, halves, {eight.x, eight.y, eight.z, eight.w}, one, one);
          else
            multiply_add_fragments(T{}, halves, {eight.x, eight.y, eight.z, eight.w}, one, one);
        }
        total[group][n] = halves[0] + halves[2];
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
              for (uint e = 0; e < 2; ++e) {
                float& to = sum[first + i][n][2 * half_row + e];
                to = fmaf(scale, part[i][n][2 * half_row + e], to);
              }
          }
        if (group == GROUPS - 1 && (first + TOGETHER) % REFILL_FRAGMENTS == 0)
          refill(first + TOGETHER - REFILL_FRAGMENTS);
      }
    }
    if (USED > 1 && N_WARPS > 1)
      __syncwarp(); // for the compiler, which else mixes what follows into the above and has no registers for that
    add_offsets(scales, at, total, lane);
  }

  /// Puts the sums of all warps, of `count` rows of x, where `pair_at` finds them. All threads take part; slabs are no
  /// longer needed.
  METAL_FUNC void gather(uchar* memory, uint count, uint warp, uint lane) const {
    __syncthreads();
    // To a pointer, what differs between stores is added as a constant; an index would be computed for each.
    float* own = reinterpret_cast<float*>(memory) + (warp * SUMS + lane % 4 * 2 * SUM_STRIDE + lane / 4);
#pragma unroll
    for (uint n = 0; n < COLUMN_FRAGMENTS; ++n) {
      if (8 * n >= count)
        break;
#pragma unroll
      for (uint f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (uint e = 0; e < 4; ++e)
          own[(8 * n + e % 2) * SUM_STRIDE + f * 16 + e / 2 * 8] = sum[f][n][e];
    }
    __syncthreads();
  }

  /// The sums of row `row` of x and weight rows weight_row, which is even, and weight_row + 1 of `matrix`, of all
  /// warps' rows, after `gather`.
  METAL_FUNC static float2 pair_at(const uchar* memory, uint row, uint matrix, uint weight_row) {
    const float* from = reinterpret_cast<const float*>(memory) +
                        (weight_row / WEIGHT_ROWS * (K_WARPS * SUMS) + row * SUM_STRIDE + weight_row % WEIGHT_ROWS);
    float2 total{0.0f, 0.0f};
#pragma unroll
    for (uint warp = 0; warp < K_WARPS; ++warp) {
      const float2 part = *reinterpret_cast<const float2*>(from + warp * SUMS + matrix * WEIGHT_ROWS);
      total.x += part.x, total.y += part.y;
    }
    return total;
  }

  /// sum += all of K, of `count` rows that begin at x(row). If WAITS, wait() is called once ahead of those, when as
  /// many weights are on their way as there is room for.
  template <bool WAITS, typename X, typename Wait>
  METAL_FUNC void multiply_add_all(uchar* memory, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                   uint last_row, const X& x, uint count, uint K, uint warp, uint lane,
                                   const Wait& wait) {
    const uint slabs = (K + SLAB - 1) / SLAB,
               steps = (slabs + K_WARPS - 1) / K_WARPS;     // of all warps: they share chunks
    const uint x_lane = warp / K_WARPS * SIMD_WIDTH + lane; // of the warps that share rows
    const OwnRows own_x(x, count, x_lane);
    const uint k_warp = warp % K_WARPS;
    first_row += warp / K_WARPS * WEIGHT_ROWS;
    const auto slab = [&](uint step) { return memory + (warp * STAGES + step % STAGES) * CODE_BYTES; };
    const auto rows = [&](uint step) { return memory + X_AT + (k_warp * STAGES + step % STAGES) * X_SLAB_BYTES; };
    const auto chunk = [&](uint step) {
      const uint place = warp / K_WARPS * 2 + step / CHUNK_STEPS % 2;
      return memory + CHUNKS_AT + place * (ROWS * SCALE_ROW);
    };
    const auto start_weights = [&](uint step, bool codes) {
      const uint index = k_warp + step * K_WARPS;
      if (codes && index < slabs)
        Slab::copy_codes(slab(step), matrices, first_row, last_row, index * SLAB, K, lane);
      if (step % CHUNK_STEPS == 0)
        Slab::template copy_scales<K_WARPS * SIMD_WIDTH>(chunk(step), matrices, first_row, last_row,
                                                         step * K_WARPS * SLAB, K, k_warp * SIMD_WIDTH + lane);
    };
    const auto start_rows = [&](uint step) {
      const uint index = k_warp + step * K_WARPS;
      if (index < slabs)
        copy_rows(rows(step), own_x, index * SLAB, K, x_lane);
    };
    const auto use = [&](uint step, const auto& refill) {
      if (step % CHUNK_STEPS == 0)
        __syncthreads();
      if (k_warp + step * K_WARPS >= slabs)
        return;
      const uint at = (step % CHUNK_STEPS * K_WARPS + k_warp) * SCALE_BYTES;
      if (COLUMN_FRAGMENTS > 1 && count <= 8) // one fragment has them
        multiply_add<1>(slab(step), rows(step), chunk(step), at, refill, lane);
      else
        multiply_add(slab(step), rows(step), chunk(step), at, refill, lane);
    };
    if constexpr (WAITS) {
      for (uint step = 0; step < min(steps, STAGES); ++step)
        start_weights(step, true);
      wait();
    }
    for (uint step = 0; step < steps + STAGES; ++step) {
      typename Slab::CodeCopies codes{matrices};
      if (step >= STAGES) {
        copy_wait_own<STAGES - 1>();
        meet(warp);
        if (REFILLS && step < steps)
          codes.prepare(slab(step), first_row, last_row, (k_warp + step * K_WARPS) * SLAB, K, lane);
        use(step - STAGES, [&](uint fragment) {
          if constexpr (REFILLS)
            codes.template start<REFILL_FRAGMENTS * 16>(fragment * 16);
        });
        meet(warp);
      }
      if (step < steps) {
        if (!WAITS || step >= STAGES)
          start_weights(step, !codes.wanted);
        start_rows(step);
      }
      copy_commit(); // also of nothing: the wait counts groups
    }
  }

private:
  /// The warps that share rows of x wait for each other.
  METAL_FUNC static void meet(uint warp) {
    if constexpr (N_WARPS == 1)
      __syncwarp();
    else
      barrier_of(1 + warp % K_WARPS, N_WARPS * SIMD_WIDTH); // 0 is that of all threads
  }

  /// What the pieces of 16 bytes of a row of x are exchanged by: a load has two rows at a time.
  METAL_FUNC static constexpr uint x_swizzle(uint row) { return row % 2 * 5; }

  /// WHOLE: all columns are there.
  template <bool WHOLE>
  METAL_FUNC static void copy_row_pieces(uchar* to, const OwnRows& x, uint first, uint K, uint lane) {
#pragma unroll
    for (uint n = 0; n < OwnRows::COUNT; ++n) {
      const uint row = n * X_ROWS_AT_ONCE + lane / X_LANES, own = lane % X_LANES;
      const T* from = x.row[n] + first + own * 8;
      const auto copy = [&](auto at) {
        constexpr uint I = decltype(at)::AT;
        uchar* place = to + row * X_BYTES + (I % 8 ^ own ^ x_swizzle(row)) * 16;
        if constexpr (WHOLE)
          copy_async_at<I / 8 * 128, I * 16>(place, from, row < x.count); // sums of other rows are not looked at
        else
          copy_async(place + I / 8 * 128, from + I * 8, row < x.count && first + (I + own) * 8 < K);
      };
      Slab::template for_each_place<0, SLAB / 8, X_LANES>(copy);
    }
  }

  /// sum += the products of scales and biases with totals, of all groups of a slab, two groups at a time.
  template <uint USED>
  METAL_FUNC void add_offsets(const uchar* scales, uint at, const float (&total)[GROUPS][USED], uint lane) {
#pragma unroll
    for (uint group = 0; group < GROUPS; group += 2) {
      if constexpr (!FP16_SCALES)
        add_bfloat_offsets(scales, at, group, total, lane);
      else
        add_tf32_offsets(scales, at, group, total, lane);
    }
  }

  /// In bf16. K of lanes t: scales of both groups, then their biases, as they are stored; with totals' part t of three.
  template <uint USED>
  METAL_FUNC void add_bfloat_offsets(const uchar* scales, uint at, uint group, const float (&total)[GROUPS][USED],
                                     uint lane) {
    const uint g = lane / 4, t = lane % 4;
    const uchar* own_scales = scales + g * SCALE_ROW + scale_place(g, at) + group * 2;
    const uchar* own_biases = scales + g * SCALE_ROW + scale_place(g, CHUNK_BYTES + at) + group * 2;
    uint32_t of_scales[USED], of_biases[USED];
#pragma unroll
    for (uint n = 0; n < USED; ++n) {
      float rest[2] = {total[group][n], GROUPS > 1 ? total[group + (GROUPS > 1)][n] : 0.0f};
      uint32_t own = 0; // of lanes t = 3
#pragma unroll
      for (uint part = 0; part < 3; ++part) {
        const auto first = __builtin_bit_cast(uint32_t, rest[0]), second = __builtin_bit_cast(uint32_t, rest[1]);
        own = t == part ? __byte_perm(first, second, 0x7632) : own;
        rest[0] -= __builtin_bit_cast(float, first & 0xFFFF0000u);
        rest[1] -= __builtin_bit_cast(float, second & 0xFFFF0000u);
      }
      of_biases[n] = own;
      of_scales[n] = multiply_bfloats(own, PackedCodes<T>::NEGATIVE_OFFSETS);
    }
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f) {
      const uint32_t a[4] = {
          load_scale_word(own_scales + f * 16 * SCALE_ROW), load_scale_word(own_scales + (f * 16 + 8) * SCALE_ROW),
          load_scale_word(own_biases + f * 16 * SCALE_ROW), load_scale_word(own_biases + (f * 16 + 8) * SCALE_ROW)};
#pragma unroll
      for (uint n = 0; n < USED; ++n)
        multiply_add_fragments(bfloat{}, sum[f][n], a, of_scales[n], of_biases[n]);
    }
  }

  /// In tf32. K: scales of both groups, then their biases, with totals' high parts; again with what those leave.
  template <uint USED>
  METAL_FUNC void add_tf32_offsets(const uchar* scales, uint at, uint group, const float (&total)[GROUPS][USED],
                                   uint lane) {
    const uint g = lane / 4, t = lane % 4, second = GROUPS > 1 ? t % 2 : 0;
    const uchar* own = scales + g * SCALE_ROW + scale_place(g, t / 2 * CHUNK_BYTES + at) + (group + second) * 2;
    uint32_t high[USED], low[USED];
#pragma unroll
    for (uint n = 0; n < USED; ++n) {
      const float other = GROUPS > 1 ? total[group + (GROUPS > 1)][n] : 0.0f;
      const float value = (t % 2 ? other : total[group][n]) * (t < 2 ? -PackedCodes<T>::OFFSET : 1.0f);
      high[n] = __builtin_bit_cast(uint32_t, value) & 0xFFFFE000u;
      low[n] = __builtin_bit_cast(uint32_t, value - __builtin_bit_cast(float, high[n]));
    }
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f) {
      uint32_t half_rows[2];
#pragma unroll
      for (uint half_row = 0; half_row < 2; ++half_row) {
        const uchar* from = own + (f * 16 + half_row * 8) * SCALE_ROW;
        half_rows[half_row] = __builtin_bit_cast(uint32_t, scale_of(*reinterpret_cast<const uint16_t*>(from), 0));
      }
#pragma unroll
      for (uint n = 0; n < USED; ++n)
        multiply_add_tf32(sum[f][n], half_rows, high[n], low[n]);
    }
  }
};

} // namespace metal_sim
