// Dot products of rows of 4-bit codes in integers, for an engine whose simdgroup is one thread: a product of bytes
// takes 32 codes in one instruction, a product of fp32 eight, and codes need no conversion.
//
// x is rounded to 20 bits beside the largest element of its group: an element to 2^-20 of that one, which fp16 and bf16
// have room for (fp32 has not: it is multiplied as it is). The 20 bits are three signed digits of base 128, each a
// byte. Sums over a group are exact; they become fp32 when the group's scale is applied.
//
// x is prepared once for all rows of a block, in pieces of CHUNK_RUNS runs, and rows are read from one end to the
// other.
#pragma once
#include "native_dot.h"

namespace metal_sim {

/// Elements that every format decodes together; kernels/formats/quantized.h.
constexpr uint QUANTIZED_RUN = 32;

} // namespace metal_sim

#if defined(__AVX2__) && defined(__F16C__)
#define METAL_SIM_INTEGER_DOT 1

namespace metal_sim {

/// Two runs of x as bytes: of each digit first the elements of even, then those of odd places, the first run's 16 in
/// the lower half of a vector.
struct IntegerPair {
  alignas(32) int8_t digit[3][2][32];
};

/// A piece of a row of x: `pairs` of its runs; for each group the sum of x and what an integer of it is worth, and
/// zeros up to a multiple of eight groups.
struct IntegerRow {
  static constexpr uint CHUNK_RUNS = 128;

  IntegerPair pairs[CHUNK_RUNS / 2];
  alignas(32) float unit[CHUNK_RUNS];
  alignas(32) float total[CHUNK_RUNS];

  /// `runs` runs in groups of `group_runs`. False where a group has elements that are not finite, or of which the
  /// largest is so small that its unit is none: then nothing may be used.
  template <typename T>
  METAL_FUNC bool prepare(const T* x, uint runs, uint group_runs) {
    uint group = 0;
    for (uint first = 0; first < runs; first += group_runs, ++group) {
      const uint end = first + group_runs;
      Float8 sums = {};
      __m256i largest = _mm256_setzero_si256();
      for (uint i = first * QUANTIZED_RUN; i < end * QUANTIZED_RUN; i += 8) {
        const Float8 v = load8(x + i);
        sums += v;
        largest =
            _mm256_max_epi32(largest, _mm256_and_si256(__builtin_bit_cast(__m256i, v), _mm256_set1_epi32(0x7FFFFFFF)));
      }
      const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
      const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
      const int bits = _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1))), exponent = bits >> 23;
      if (exponent == 0xFF || (bits != 0 && exponent < SMALLEST_EXPONENT))
        return false;
      // Below 2^(exponent - 126), and times the factor below 2^20.
      const int factor_exponent = bits != 0 ? 127 + 20 + 126 - exponent : 127;
      unit[group] = as_float(2 * 127 - factor_exponent);
      total[group] = sum(sums);
      const __m256 factor = _mm256_set1_ps(as_float(factor_exponent));
      for (uint run = first; run < end; ++run)
        split(x + run * QUANTIZED_RUN, factor, pairs[run / 2], run % 2);
    }
    for (; group % 8; ++group)
      unit[group] = total[group] = 0.0f;
    if (runs % 2) // what is multiplied beside the last run's codes, which are zeros
      for (auto& digit : pairs[runs / 2].digit)
        for (auto& half : digit)
          __builtin_memset(half + 16, 0, 16);
    return true;
  }

private:
  /// Of a float whose unit, 2^20 times smaller, and that one's inverse are normal numbers.
  static constexpr int SMALLEST_EXPONENT = 20;

  /// 2^(exponent - 127).
  METAL_FUNC static float as_float(int exponent) { return __builtin_bit_cast(float, exponent << 23); }

  template <typename T>
  METAL_FUNC static void split(const T* x, __m256 factor, IntegerPair& pair, uint half) {
    __m256i digits[3][4];
    for (uint i = 0; i < 4; ++i) {
      const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(__builtin_bit_cast(__m256, load8(x + 8 * i)), factor));
      // Digits from -64 to 63 without borrowing: those of number + 64 + 64 * 128 are 64 more, but for the first.
      const __m256i above = _mm256_add_epi32(number, _mm256_set1_epi32(64 + 64 * 128));
      const __m256i mask = _mm256_set1_epi32(127), zero = _mm256_set1_epi32(64);
      digits[0][i] = _mm256_srai_epi32(above, 14);
      digits[1][i] = _mm256_sub_epi32(_mm256_and_si256(_mm256_srai_epi32(above, 7), mask), zero);
      digits[2][i] = _mm256_sub_epi32(_mm256_and_si256(above, mask), zero);
    }
    for (uint d = 0; d < 3; ++d) {
      const __m256i words0 = _mm256_packs_epi32(digits[d][0], digits[d][1]);
      const __m256i words1 = _mm256_packs_epi32(digits[d][2], digits[d][3]);
      const __m256i in_order =
          _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words0, words1), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      const __m256i by_parity = _mm256_shuffle_epi8(
          in_order, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
      const __m256i halves = _mm256_permute4x64_epi64(by_parity, 0xD8);
      _mm_store_si128(reinterpret_cast<__m128i*>(pair.digit[d][0] + 16 * half), _mm256_castsi256_si128(halves));
      _mm_store_si128(reinterpret_cast<__m128i*>(pair.digit[d][1] + 16 * half), _mm256_extracti128_si256(halves, 1));
    }
  }
};

/// The sum of codes times digits of pairs, for each digit in 16-bit elements: up to two pairs, 4 products of 15 * 127
/// each.
struct IntegerSums {
  __m256i digit[3] = {};

  METAL_FUNC void add(__m256i codes, const IntegerPair& x) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i even = _mm256_and_si256(codes, mask), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
    for (uint d = 0; d < 3; ++d) {
      const auto part = [&](__m256i half, uint parity) {
        return _mm256_maddubs_epi16(half, _mm256_load_si256(reinterpret_cast<const __m256i*>(x.digit[d][parity])));
      };
      digit[d] = _mm256_add_epi16(digit[d], _mm256_add_epi16(part(even, 0), part(odd, 1)));
    }
  }
  METAL_FUNC Float8 total() const {
    const __m256i high = _mm256_madd_epi16(digit[0], _mm256_set1_epi16(128 * 128));
    const __m256i middle = _mm256_madd_epi16(digit[1], _mm256_set1_epi16(128));
    const __m256i low = _mm256_madd_epi16(digit[2], _mm256_set1_epi16(1));
    return __builtin_bit_cast(Float8, _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(high, middle), low)));
  }
};

/// Codes of the pair of runs at `from`, or of its first run and zeros.
METAL_FUNC __m256i load_pair(const uchar* from, bool both) {
  return both ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
              : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

/// acc += codes . x, lane by lane, over `runs` runs of a row, whole groups; what a group's integers are worth is
/// `scale`. With one run in a group the scale behind the last one is read too and has to be finite. Memory is asked for
/// what is `next` bytes further on.
template <uint GROUP_RUNS>
METAL_FUNC void add_integer_row(const uchar* codes, uint runs, ulong next, const IntegerRow& x, const float* scale,
                                Float8& acc) {
  constexpr uint PAIR_BYTES = 32;
  constexpr uint PAIRS = GROUP_RUNS > 2 ? GROUP_RUNS / 2 : 1; // that have a scale, or two, of their own
  for (uint pair = 0; 2 * pair < runs; pair += PAIRS) {
    IntegerSums sums;
    _Pragma("GCC unroll 2") for (uint p = pair; p < pair + PAIRS; ++p) {
      const uchar* from = codes + PAIR_BYTES * p;
      __builtin_prefetch(from + next);
      sums.add(load_pair(from, GROUP_RUNS > 1 || 2 * p + 1 < runs), x.pairs[p]);
    }
    const float* of = scale + (GROUP_RUNS == 1 ? 2 * pair : pair / PAIRS);
    __m256 scales = _mm256_broadcast_ss(of);
    if (GROUP_RUNS == 1)
      scales = _mm256_insertf128_ps(scales, _mm_broadcast_ss(of + 1), 1);
    acc += sums.total() * __builtin_bit_cast(Float8, scales);
  }
}

} // namespace metal_sim

#endif
