// Products of one row of x with weights of 4-bit affine codes, in integers, on NVIDIA GPUs' tensor cores. Compute
// capability 8.0 or later.
//
// x is what few warps can make ready while weights are on their way: an element becomes an integer of 31 bits beside
// the largest of its slab, in four digits, signed bytes. Codes are bytes where they stand: the low halves of a word's
// bytes are its even codes, the high halves its odd ones 16 times over, for which x is divided by 16. So a word of
// eight codes takes two logical operations, and m16n8k32 multiplies 16 weight rows, 32 of K, by four digits in four of
// its eight columns. Sums of a scale group are exact; with scale s and bias b of a weight row:
//
//   sum of (s * code + b) * x = s * sum of code * x + b * total of x
//
// A lane (g, t), g = lane / 4, t = lane % 4, has weight rows g and g + 8 of a fragment, and of their sums two digits,
// if t < 2. Biases are multiplied by the lanes of a row in turn. Sums are fp32.
//
// Each warp has slabs of K of its own, and the digits of x for them: no warp waits for another before the sums are
// added up.
#pragma once

#include "cuda_packed_slab.h"

namespace metal_sim {

/// Slabs of weights (cuda_packed_slab.h) times one row of x. The WARPS share K. STAGES: slabs of a warp at a time;
/// X_STAGES: those for which x is ready. WHOLE: a row has no more slabs than there are warps. Then the stages are of
/// STAGES times as many weight rows, whose scales are copied for all warps at once.
template <typename T, uint GROUP, bool FP16_SCALES, uint MATRICES, uint WEIGHT_ROWS, uint SLAB, uint WARPS, uint STAGES,
          uint X_STAGES, bool WHOLE>
struct PackedRow
    : PackedSlab<GROUP, FP16_SCALES, MATRICES, WEIGHT_ROWS, SLAB, (WHOLE ? WARPS : 1) * (2 * SLAB / GROUP)> {
  using Slab = PackedSlab<GROUP, FP16_SCALES, MATRICES, WEIGHT_ROWS, SLAB, (WHOLE ? WARPS : 1) * (2 * SLAB / GROUP)>;
  using Slab::CODE_BYTES, Slab::FRAGMENTS, Slab::GROUPS, Slab::ROW_BYTES, Slab::ROWS, Slab::SCALE_ROW, Slab::WORDS;
  using Slab::load_scale_word, Slab::load_words, Slab::scale_of, Slab::scale_place, Slab::swizzle;
  static constexpr uint SLAB_BYTES = CODE_BYTES + (WHOLE ? 0 : ROWS * SCALE_ROW);
  /// A lane makes eight elements ready.
  static constexpr uint ELEMENTS = 8, GROUP_LANES = GROUP / ELEMENTS;
  static_assert(SLAB == ELEMENTS * SIMD_WIDTH && sizeof(T) == 2);
  /// Of x: for each column of digits 8 bytes a word of codes, those of even codes, then of odd ones. A quarter more
  /// keeps the columns that a load needs at a time in different banks; the totals of groups and the slab's factors
  /// are in such places.
  static constexpr uint DIGITS = 4, DIGIT_BYTES = SLAB + SLAB / 4, X_BYTES = DIGITS * DIGIT_BYTES;
  static constexpr uint TOTALS_AT = SLAB, FACTORS_AT = DIGIT_BYTES + SLAB;
  static_assert(GROUPS * 4 <= SLAB / 4);
  static constexpr uint X_AT = STAGES * SLAB_BYTES, WARP_BYTES = X_AT + X_STAGES * X_BYTES;
  static constexpr uint SCALES_AT = WARPS * WARP_BYTES; // where WHOLE
  /// Of shared memory.
  static constexpr uint BYTES = SCALES_AT + (WHOLE ? STAGES * ROWS * SCALE_ROW : 0);
  static_assert(SLAB_BYTES % 16 == 0 && STAGES * ROWS * 4 <= WARP_BYTES);

  float sum[FRAGMENTS][2];

  METAL_FUNC void clear() {
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f)
      sum[f][0] = sum[f][1] = 0.0f;
  }

  /// Starts copying K first .. first + SLAB - 1 of weight rows first_row .. last_row, with their scales and biases.
  METAL_FUNC static void copy_weights(uchar* slab, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                      uint last_row, uint first, uint K, uint lane) {
    Slab::copy_codes(slab, matrices, first_row, last_row, first, K, lane);
    Slab::template copy_scales<SIMD_WIDTH>(slab + CODE_BYTES, matrices, first_row, last_row, first, K, lane);
  }

  /// A lane's elements of a slab of x, and what the slab's products are multiplied by.
  struct Elements {
    uint4 words;
    float weight;
  };
  METAL_FUNC static Elements load_elements(const T* x, float weight, uint first, uint K, uint lane) {
    const uint k = first + lane * ELEMENTS;
    return {k < K ? __ldcg(reinterpret_cast<const uint4*>(x + k)) : uint4{0, 0, 0, 0}, weight};
  }

  METAL_FUNC static void store_digits(uchar* to, const Elements& elements, uint lane) {
    const uint32_t words[4] = {elements.words.x, elements.words.y, elements.words.z, elements.words.w};
    float value[ELEMENTS];
    uint32_t pairs = 0;
#pragma unroll
    for (uint i = 0; i < ELEMENTS; ++i) {
      value[i] = float(__builtin_bit_cast(T, uint16_t(words[i / 2] >> i % 2 * 16)));
      if (i % 2 == 0)
        pairs = __vmaxu2(pairs, words[i / 2] & 0x7FFF7FFFu);
    }
    const uint32_t bits = __reduce_max_sync(~0u, max(pairs & 0xFFFFu, pairs >> 16));
    const uint32_t largest = __builtin_bit_cast(uint32_t, float(__builtin_bit_cast(T, uint16_t(bits))));
    // The power of two that takes the largest value to 2^29 or just above, as a product of two: the smallest values
    // want more than there is.
    const uint32_t exponent = 283 - (largest >> 23), first = min(exponent, 253u), second = exponent - first;
    float total = ((value[0] + value[1]) + (value[2] + value[3])) + ((value[4] + value[5]) + (value[6] + value[7]));
    const float scale = power_of_two(first), odd_scale = power_of_two(first - 4);
    uint32_t digits[ELEMENTS];
    if (second > 0)
#pragma unroll
      for (uint i = 0; i < ELEMENTS; ++i)
        value[i] *= power_of_two(127 + second);
#pragma unroll
    for (uint i = 0; i < ELEMENTS; ++i) {
      const uint32_t integer = __float2int_rn(value[i] * (i % 2 ? odd_scale : scale));
      digits[i] = (integer + 0x00808080u) ^ 0x00808080u; // signed bytes
    }
    uint32_t even[DIGITS], odd[DIGITS];
    transpose(even, digits[0], digits[2], digits[4], digits[6]);
    transpose(odd, digits[1], digits[3], digits[5], digits[7]);
#pragma unroll
    for (uint column = 0; column < DIGITS; ++column) // the first column has the highest digit
      *reinterpret_cast<uint2*>(to + column * DIGIT_BYTES + lane * 8) =
          uint2{even[DIGITS - 1 - column], odd[DIGITS - 1 - column]};
#pragma unroll
    for (uint other = 1; other < GROUP_LANES; other *= 2)
      total += __shfl_xor_sync(~0u, total, other);
    if (lane % GROUP_LANES == 0)
      *reinterpret_cast<float*>(to + TOTALS_AT + lane / GROUP_LANES * 4) = total * elements.weight;
    if (lane == 0) { // their inverses, for the product may be too small
      const float not_a_number = __builtin_bit_cast(float, 0x7FC00000u);
      const float factor = largest < 0x7F800000u ? power_of_two(254 - first) : not_a_number;
      *reinterpret_cast<float2*>(to + FACTORS_AT) = float2{factor * elements.weight, power_of_two(127 - second)};
    }
  }

  /// sum += the products of a slab that has arrived. `at`: where in rows of `scales` those of the slab begin.
  METAL_FUNC void multiply_add(const uchar* slab, const uchar* x, const uchar* scales, uint at, uint lane) {
    // Fragments whose products take turns: each waits for the one before it.
    constexpr uint TOGETHER = FRAGMENTS % 2 == 0 ? 2 : 1;
    // An integer n below 2^22 added to the bits of 1.5 * 2^23 makes those of 1.5 * 2^23 + n.
    constexpr uint32_t BASE_BITS = 0x4B400000u;
    constexpr float BASE = 12582912.0f;
    const uint g = lane / 4, t = lane % 4;
    const uchar* own_x = x + g % DIGITS * DIGIT_BYTES + t * (WORDS * 8);
    const uchar* own_codes = slab + g * ROW_BYTES + t * (WORDS * 4);
    scales += g * SCALE_ROW;
    const uchar* own_scales = scales + scale_place(g, at);
    const uint own_place = swizzle(g) * 16;
    float part[FRAGMENTS][2];
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f)
      part[f][0] = part[f][1] = 0.0f;
    uint32_t scale_words[FRAGMENTS][2]; // rows g and g + 8; scales of two groups
#pragma unroll
    for (uint group = 0; group < GROUPS; ++group) {
      uint2 digits[WORDS];
#pragma unroll
      for (uint w = 0; w < WORDS; ++w)
        digits[w] = reinterpret_cast<const uint2*>(own_x + group * (4 * WORDS * 8))[w];
      // A group's pieces stand together, wherever the swizzle puts them.
      const uchar* codes = own_codes + (group * (WORDS * 16) ^ own_place);
#pragma unroll
      for (uint first = 0; first < FRAGMENTS; first += TOGETHER) {
        uint32_t upper[TOGETHER][WORDS], lower[TOGETHER][WORDS], product[TOGETHER][4];
#pragma unroll
        for (uint i = 0; i < TOGETHER; ++i) {
          load_words(upper[i], codes + (first + i) * 16 * ROW_BYTES);
          load_words(lower[i], codes + ((first + i) * 16 + 8) * ROW_BYTES);
        }
#pragma unroll
        for (uint w = 0; w < WORDS; ++w)
#pragma unroll
          for (uint i = 0; i < TOGETHER; ++i) {
            const uint32_t a[4] = {upper[i][w] & 0x0F0F0F0Fu, lower[i][w] & 0x0F0F0F0Fu, upper[i][w] & 0xF0F0F0F0u,
                                   lower[i][w] & 0xF0F0F0F0u};
            if (w == 0)
              multiply_signed_bytes(product[i], a, digits[w].x, digits[w].y, BASE_BITS);
            else
              multiply_add_signed_bytes(product[i], a, digits[w].x, digits[w].y);
          }
#pragma unroll
        for (uint i = 0; i < TOGETHER; ++i)
#pragma unroll
          for (uint half_row = 0; half_row < 2; ++half_row) {
            uint32_t& word = scale_words[first + i][half_row];
            if (group % 2 == 0)
              word = load_scale_word(own_scales + ((first + i) * 16 + half_row * 8) * SCALE_ROW + group * 2);
            const float high = __builtin_bit_cast(float, product[i][2 * half_row]) - BASE;
            const float low = __builtin_bit_cast(float, product[i][2 * half_row + 1]) - BASE;
            float& to = part[first + i][half_row];
            to = fmaf(scale_of(word, group % 2), fmaf(high, 256.0f, low), to);
          }
      }
    }
    const float2 factors = *reinterpret_cast<const float2*>(x + FACTORS_AT);
    const float own_factor = factors.y * (t == 0 ? 65536.0f : t == 1 ? 1.0f : 0.0f);
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (uint half_row = 0; half_row < 2; ++half_row)
        sum[f][half_row] = fmaf(factors.x, own_factor * part[f][half_row], sum[f][half_row]);
#pragma unroll
    for (uint first = 0; first < GROUPS; first += 4) {
      const uint group = first + t;
      if (GROUPS % 4 != 0 && group >= GROUPS)
        continue;
      const float total = *reinterpret_cast<const float*>(x + TOTALS_AT + group * 4);
      const uchar* biases = scales + scale_place(g, SCALE_ROW / 2 + at + group * 2);
#pragma unroll
      for (uint f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (uint half_row = 0; half_row < 2; ++half_row) {
          const auto word = *reinterpret_cast<const uint16_t*>(biases + (f * 16 + half_row * 8) * SCALE_ROW);
          sum[f][half_row] = fmaf(scale_of(word, 0), total, sum[f][half_row]);
        }
    }
  }

  /// Steps of a warp that takes every WARPS-th of `slabs` slabs.
  METAL_FUNC static uint steps(uint slabs, uint warp) { return (slabs + WARPS - 1 - warp) / WARPS; }

  /// sum += the products of all steps: start(slab, step) starts copying weights, elements(step) are those of x. wait()
  /// is called once ahead of those, when as many weights are on their way as there is room for. If X_IS_THERE nothing
  /// is waited for, and x is asked for ahead of weights, which would keep it waiting.
  template <bool X_IS_THERE, typename Start, typename Wait, typename X>
  METAL_FUNC void multiply_add_all(uchar* memory, uint steps, uint warp, uint lane, const Start& start,
                                   const Wait& wait, const X& elements) {
    memory += warp * WARP_BYTES;
    const auto slab = [&](uint step) { return memory + step % STAGES * SLAB_BYTES; };
    const auto digits = [&](uint step) { return memory + X_AT + step % X_STAGES * X_BYTES; };
    Elements first[X_STAGES];
    const auto load_first = [&] {
#pragma unroll
      for (uint step = 0; step < X_STAGES; ++step)
        if (step < steps)
          first[step] = elements(step);
    };
    if (X_IS_THERE)
      load_first();
#pragma unroll 1 // once is enough of the code
    for (uint step = 0; step < STAGES; ++step) {
      if (step < steps)
        start(slab(step), step);
      copy_commit(); // also of nothing: the wait counts groups
    }
    if (!X_IS_THERE) {
      wait();
      load_first();
    }
#pragma unroll
    for (uint step = 0; step < X_STAGES; ++step)
      if (step < steps)
        store_digits(digits(step), first[step], lane);
    for (uint step = 0; step < steps; ++step) {
      Elements next;
      if (step + X_STAGES < steps)
        next = elements(step + X_STAGES);
      copy_wait_own<STAGES - 1>();
      __syncwarp();
      multiply_add(slab(step), digits(step), slab(step) + CODE_BYTES, 0, lane);
      __syncwarp();
      if (step + STAGES < steps)
        start(slab(step), step + STAGES);
      copy_commit();
      if (step + X_STAGES < steps)
        store_digits(digits(step), next, lane);
    }
  }

  /// WHOLE: starts copying K first .. first + SLAB - 1 of STAGES times WEIGHT_ROWS weight rows from first_row on, and
  /// their scales. All threads take part.
  METAL_FUNC static void start_whole(uchar* memory, const PackedMatrix (&matrices)[MATRICES], uint first_row,
                                     uint last_row, uint first, uint K, uint warp, uint lane) {
#pragma unroll 1 // once is enough of the code
    for (uint i = 0; i < STAGES; ++i)
      Slab::template copy_scales<WARPS * SIMD_WIDTH>(memory + SCALES_AT + i * (ROWS * SCALE_ROW), matrices,
                                                     first_row + i * WEIGHT_ROWS, last_row, 0, K,
                                                     warp * SIMD_WIDTH + lane);
    copy_commit();
#pragma unroll 1
    for (uint i = 0; i < STAGES; ++i) {
      if (first < K)
        Slab::copy_codes(memory + warp * WARP_BYTES + i * SLAB_BYTES, matrices, first_row + i * WEIGHT_ROWS, last_row,
                         first, K, lane);
      copy_commit();
    }
  }
  /// product[i].sum += their products. All threads take part.
  METAL_FUNC static void multiply_add_whole(PackedRow (&product)[STAGES], uchar* memory, const Elements& elements,
                                            uint warp, uint lane) {
    store_digits(memory + warp * WARP_BYTES + X_AT, elements, lane);
    copy_wait_own<STAGES>();
    __syncthreads();
    multiply_add_stages<0>(product, memory, warp, lane);
  }

  /// Of threadgroup memory, for the sums of all warps.
  static constexpr uint SUM_BYTES = WARPS * ROWS * 4;

  /// Puts the sums of a warp where `at` finds them. Slabs are no longer needed.
  METAL_FUNC void put(uchar* memory, uint warp, uint lane) const {
    float* own = reinterpret_cast<float*>(memory) + warp * ROWS;
#pragma unroll
    for (uint f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (uint half_row = 0; half_row < 2; ++half_row) {
        float total = sum[f][half_row];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (lane % 4 == 0)
          own[f * 16 + half_row * 8 + lane / 4] = total;
      }
  }
  /// The same of all warps' sums. All threads take part.
  METAL_FUNC void gather(uchar* memory, uint warp, uint lane) const {
    __syncthreads();
    put(memory, warp, lane);
    __syncthreads();
  }

  /// The sum of weight row `weight_row` of `matrix`, of all warps, after `gather`.
  METAL_FUNC static float at(const uchar* memory, uint matrix, uint weight_row) {
    const float* from = reinterpret_cast<const float*>(memory) + matrix * WEIGHT_ROWS + weight_row;
    float total = from[0];
#pragma unroll
    for (uint warp = 1; warp < WARPS; ++warp)
      total += from[warp * ROWS];
    return total;
  }

private:
  template <uint I>
  METAL_FUNC static void multiply_add_stages(PackedRow (&product)[STAGES], const uchar* memory, uint warp, uint lane) {
    copy_wait_own<STAGES - 1 - I>();
    __syncwarp();
    const uchar* own = memory + warp * WARP_BYTES;
    product[I].multiply_add(own + I * SLAB_BYTES, own + X_AT, memory + SCALES_AT + I * (ROWS * SCALE_ROW),
                            warp * (2 * GROUPS), lane);
    if constexpr (I + 1 < STAGES)
      multiply_add_stages<I + 1>(product, memory, warp, lane);
  }

  /// Of an exponent as fp32 stores it.
  METAL_FUNC static float power_of_two(uint32_t exponent) { return __builtin_bit_cast(float, exponent << 23); }

  /// to[i]: byte i of each word.
  METAL_FUNC static void transpose(uint32_t (&to)[4], uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t low[2] = {__byte_perm(a, b, 0x5140), __byte_perm(c, d, 0x5140)};
    const uint32_t high[2] = {__byte_perm(a, b, 0x7362), __byte_perm(c, d, 0x7362)};
    to[0] = __byte_perm(low[0], low[1], 0x5410), to[1] = __byte_perm(low[0], low[1], 0x7632);
    to[2] = __byte_perm(high[0], high[1], 0x5410), to[3] = __byte_perm(high[0], high[1], 0x7632);
  }
};

} // namespace metal_sim
