// Trellis weights for an engine whose simdgroup is one thread, in the processor's vectors. Called by the kernels'
// formats/trellis.h where vectors of 16-bit elements can be shuffled; elsewhere that header's own loops serve.
//
// A vector holds the states of two or four runs as 16-bit elements. The bytes of those in 128 bits of it lie within 16,
// so that a shuffle with constant places puts the four bytes around two neighbouring states into each 32 bits, and two
// shifts cut both states out. Arithmetic is on 16-bit elements as far as it goes: no state is masked, and a product
// takes three multiplications for 16 or 32 weights. Two unpacks make fp32 of them, so that lanes of 128 bits hold the
// halves of two runs: the unpacked vectors are whole runs.
#pragma once
#include "native_vector.h"

#if defined(__AVX2__) // and with it F16C and FMA, at every level that has it

namespace metal_sim {

/// The 128-bit lanes of a vector, and the words that trellis arithmetic needs.
#if defined(__AVX512BW__)
constexpr uint TRELLIS_LANES = 4;
using TrellisVector = __m512i;
using TrellisFloats = __m512;
#define METAL_SIM_TRELLIS(NAME) _mm512_##NAME
METAL_FUNC TrellisVector trellis_load(const void* from) { return _mm512_load_si512(from); }
METAL_FUNC TrellisVector trellis_join(const __m128i (&lane)[4]) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(lane[0]), lane[1], 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(lane[2]), lane[3], 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
METAL_FUNC TrellisVector trellis_repeat(__m128i lane) { return _mm512_broadcast_i32x4(lane); }
METAL_FUNC TrellisVector trellis_and(TrellisVector a, TrellisVector b) { return _mm512_and_si512(a, b); }
METAL_FUNC TrellisVector trellis_xor(TrellisVector a, TrellisVector b) { return _mm512_xor_si512(a, b); }
/// Even elements of a, odd ones of b.
METAL_FUNC TrellisVector trellis_mix(TrellisVector a, TrellisVector b) {
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, a, b);
}
/// -1 where a > b, signed, else 0.
METAL_FUNC TrellisVector trellis_above(TrellisVector a, TrellisVector b) {
  return _mm512_movm_epi16(_mm512_cmpgt_epi16_mask(a, b));
}
#else
constexpr uint TRELLIS_LANES = 2;
using TrellisVector = __m256i;
using TrellisFloats = __m256;
#define METAL_SIM_TRELLIS(NAME) _mm256_##NAME
METAL_FUNC TrellisVector trellis_load(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
METAL_FUNC TrellisVector trellis_join(const __m128i (&lane)[2]) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lane[0]), lane[1], 1);
}
METAL_FUNC TrellisVector trellis_repeat(__m128i lane) { return _mm256_broadcastsi128_si256(lane); }
METAL_FUNC TrellisVector trellis_and(TrellisVector a, TrellisVector b) { return _mm256_and_si256(a, b); }
METAL_FUNC TrellisVector trellis_xor(TrellisVector a, TrellisVector b) { return _mm256_xor_si256(a, b); }
METAL_FUNC TrellisVector trellis_mix(TrellisVector a, TrellisVector b) { return _mm256_blend_epi16(a, b, 0xAA); }
METAL_FUNC TrellisVector trellis_above(TrellisVector a, TrellisVector b) { return _mm256_cmpgt_epi16(a, b); }
#endif

/// 32-bit elements of a part of the vectors' 16-bit ones: the first four, or the last four, of each 128 bits.
METAL_FUNC TrellisFloats trellis_unpack(TrellisVector low, TrellisVector high, uint part) {
  return __builtin_bit_cast(TrellisFloats, part == 0 ? METAL_SIM_TRELLIS(unpacklo_epi16)(low, high)
                                                     : METAL_SIM_TRELLIS(unpackhi_epi16)(low, high));
}

/// The first bit of a state, counted from the ring's beginning: before it where negative.
constexpr int trellis_state_bit(uint half_bits, uint weight) { return int((weight + 1) * half_bits / 2) - 16; }

/// Of the byte that holds a bit, counted in the ring's order.
constexpr int trellis_byte(int bit) { return (bit + 32) / 8 - 4; }

/// Where a byte in the ring's order lies in memory: words are little-endian, their most significant bit comes first.
constexpr int trellis_place(int byte) { return (byte + 4) / 4 * 4 - 4 + (3 - (byte + 4) % 4); }

/// The words that hold the states of consecutive weights, as places in memory from a tile's first byte on. Those that
/// begin before the ring's beginning are read from a copy whose first word is the tile's last.
struct TrellisWindow {
  int first, end;

  constexpr TrellisWindow(uint half_bits, uint first_weight, uint last_weight)
      : first((trellis_byte(trellis_state_bit(half_bits, first_weight)) + 4) / 4 * 4 - 4),
        end((trellis_byte(trellis_state_bit(half_bits, last_weight) + 15) + 4) / 4 * 4) {}
  constexpr bool wraps() const { return first < 0; }
  constexpr bool fits() const { return end - first <= 16; }
  /// Where to read 16 bytes that hold it, none of them beyond the tile.
  constexpr int begin(uint half_bits) const {
    return wraps() ? -4 : first < int(16 * half_bits) - 16 ? first : int(16 * half_bits) - 16;
  }
};

/// Of the states of a vector, whose first run is RUN: which weights' they are, which bytes go where, and by how much to
/// shift.
template <uint HALF_BITS, uint RUN>
struct TrellisPlaces {
  /// Weight of element i of a lane.
  static constexpr uint weight(bool halves, uint lane, uint i) {
    return halves ? 8 * (RUN + lane / 2 * 2 + i / 4) + lane % 2 * 4 + i % 4 : 8 * (RUN + lane) + i;
  }
  static constexpr TrellisWindow window(bool halves, uint first_lane, uint last_lane) {
    return TrellisWindow(HALF_BITS, weight(halves, first_lane, 0), weight(halves, last_lane, 7));
  }
  /// Whether two lanes share two runs, each having a half of either; else each has a run. With 7 1/2 bits a lane's
  /// bytes may lie too far apart for that.
  static constexpr bool halves() {
    for (uint lane = 0; lane < TRELLIS_LANES; ++lane)
      if (!window(true, lane, lane).fits())
        return false;
    return true;
  }
  static constexpr bool HALVES = halves();
  /// Lanes that are read together.
  static constexpr uint group() {
    for (uint lanes = TRELLIS_LANES; lanes > 1; lanes /= 2) {
      bool fit = true;
      for (uint lane = 0; lane < TRELLIS_LANES; lane += lanes)
        fit = fit && window(HALVES, lane, lane + lanes - 1).fits();
      if (fit)
        return lanes;
    }
    return 1;
  }
  static constexpr uint GROUP = group();

  static constexpr TrellisWindow window(uint lane) {
    return window(HALVES, lane / GROUP * GROUP, lane / GROUP * GROUP + GROUP - 1);
  }

  alignas(64) uchar byte[TRELLIS_LANES][16];
  alignas(64) uint right[TRELLIS_LANES][4]; // of the earlier state of two
  alignas(64) uint left[TRELLIS_LANES][4];  // of the later one

  constexpr TrellisPlaces() : byte(), right(), left() {
    for (uint lane = 0; lane < TRELLIS_LANES; ++lane)
      for (uint pair = 0; pair < 4; ++pair) {
        const uint earlier = weight(HALVES, lane, 2 * pair);
        const int bit = trellis_state_bit(HALF_BITS, earlier), next = trellis_state_bit(HALF_BITS, earlier + 1);
        const int first = trellis_byte(bit);
        for (int i = 0; i < 4; ++i) {
          const int place = trellis_place(first + i) - window(lane).begin(HALF_BITS);
          // A byte behind both states may lie outside.
          byte[lane][4 * pair + 3 - i] = uchar(place >= 0 && place < 16 ? place : 0x80);
        }
        right[lane][pair] = uint(16 - (bit - 8 * first));
        left[lane][pair] = uint(next - 8 * first);
      }
  }
};
template <uint HALF_BITS, uint RUN>
constexpr TrellisPlaces<HALF_BITS, RUN> trellis_places{};

/// The states of the runs of a vector.
template <uint HALF_BITS, uint RUN>
METAL_FUNC TrellisVector trellis_states(const uint* tile) {
  using Places = TrellisPlaces<HALF_BITS, RUN>;
  const auto read = [&](TrellisWindow window) {
    if (window.wraps())
      return _mm_insert_epi32(_mm_slli_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile)), 4),
                              int(tile[4 * HALF_BITS - 1]), 0);
    const char* bytes = reinterpret_cast<const char*>(tile);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + window.begin(HALF_BITS)));
  };
  TrellisVector codes;
  if constexpr (Places::GROUP == TRELLIS_LANES) {
    codes = trellis_repeat(read(Places::window(0)));
    // Hidden from the compiler, which would make one shuffle of both and with it a slower one of a broadcasting load.
    asm("" : "+x"(codes));
  } else {
    __m128i lane[TRELLIS_LANES];
    for (uint i = 0; i < TRELLIS_LANES; ++i)
      lane[i] = read(Places::window(i));
    codes = trellis_join(lane);
  }
  constexpr const Places& places = trellis_places<HALF_BITS, RUN>;
  const TrellisVector pairs = METAL_SIM_TRELLIS(shuffle_epi8)(codes, trellis_load(places.byte));
  return trellis_mix(METAL_SIM_TRELLIS(srlv_epi32)(pairs, trellis_load(places.right)),
                     METAL_SIM_TRELLIS(sllv_epi32)(pairs, trellis_load(places.left)));
}

/// Each element, times 2^112 a normal number of fp16 or zero, times 2^112 and rounded to the nearest fp16: (2^13 + 1) v
/// is a multiple of what 11 bits of 2^13 v count, and so is the difference of both, which is v but for that one
/// rounding. Ties go to even for the values of all states, as a test over them shows.
METAL_FUNC TrellisFloats trellis_round(TrellisFloats v) {
  const auto all = [](float value) { return METAL_SIM_TRELLIS(set1_ps)(__builtin_ldexpf(value, 112)); };
  return METAL_SIM_TRELLIS(fnmadd_ps)(v, all(8192.0f), METAL_SIM_TRELLIS(mul_ps)(v, all(8193.0f)));
}

/// trellis_value of states; CODEBOOK as in formats/trellis.h: 0 3inst, 1 mcg, 2 mul1. value[0]: of the first four
/// elements of each 128 bits.
template <uint CODEBOOK>
METAL_FUNC void trellis_values(TrellisVector state, TrellisFloats (&value)[2]) {
  constexpr uint FACTOR = CODEBOOK == 0 ? 89226354u : CODEBOOK == 1 ? 0xCBAC1FEDu : 0x83DCD12Du;
  const auto all = [](uint bits) { return METAL_SIM_TRELLIS(set1_epi16)(short(bits)); };
  // Both halves of the low 32 bits of the product.
  TrellisVector low = METAL_SIM_TRELLIS(mullo_epi16)(state, all(FACTOR));
  TrellisVector high = METAL_SIM_TRELLIS(add_epi16)(METAL_SIM_TRELLIS(mulhi_epu16)(state, all(FACTOR)),
                                                    METAL_SIM_TRELLIS(mullo_epi16)(state, all(FACTOR >> 16)));
  if constexpr (CODEBOOK == 2) {
    // 64 times the sum of the product's bytes is below 2^16. Below the upper half of 234 * 1024 as an fp32 it makes one
    // of 234 * 1024 + sum. The value is (1024 + sum) * 887 / 2^17 - 10.3828125, which with that number is an fma whose
    // addend, -1625, is short enough that 2^13 and 2^13 + 1 times the value are one as well; see trellis_round.
    const TrellisVector weight = METAL_SIM_TRELLIS(set1_epi8)(64);
    const TrellisVector bytes = METAL_SIM_TRELLIS(add_epi16)(METAL_SIM_TRELLIS(maddubs_epi16)(low, weight),
                                                             METAL_SIM_TRELLIS(maddubs_epi16)(high, weight));
    constexpr float FACTOR_OF_SUM = 887.0f / 131072.0f;
    constexpr float ADDEND = -10.3828125f - 233 * 1024 * FACTOR_OF_SUM;
    const auto times = [](float scale, TrellisFloats sum) {
      return METAL_SIM_TRELLIS(fmadd_ps)(sum, METAL_SIM_TRELLIS(set1_ps)(scale * FACTOR_OF_SUM),
                                         METAL_SIM_TRELLIS(set1_ps)(scale * ADDEND));
    };
    for (uint part = 0; part < 2; ++part) {
      const TrellisFloats sum = trellis_unpack(bytes, all(0x486A), part);
      value[part] = METAL_SIM_TRELLIS(sub_ps)(times(8193.0f, sum), times(8192.0f, sum));
    }
  } else {
    uint flip = 0;
    if constexpr (CODEBOOK == 0) {
      // With the upper bit turned over, sums compare as signed numbers. One more is carried where the sum of the low
      // halves is below its addend.
      constexpr uint ADDEND = 64248484u;
      flip = 0x8000;
      low = METAL_SIM_TRELLIS(add_epi16)(low, all(ADDEND ^ flip));
      high = METAL_SIM_TRELLIS(sub_epi16)(METAL_SIM_TRELLIS(add_epi16)(high, all(ADDEND >> 16)),
                                          trellis_above(all(ADDEND ^ flip), low));
    }
    // ((bits & 0x8FFF) ^ 0x3B60) of either half is an fp16, never subnormal. Its exponent and mantissa three bits lower
    // are those of an fp32, times 2^-112 for want of a bias, in which sums are exact and normal.
    const auto upper = [&](TrellisVector bits, uint sign) {
      return trellis_xor(trellis_and(METAL_SIM_TRELLIS(srai_epi16)(bits, 3), all(0x81FF)), all(0x3B60 >> 3 ^ sign));
    };
    const TrellisVector upper_low = upper(low, flip), upper_high = upper(high, 0);
    const TrellisVector lower_low = METAL_SIM_TRELLIS(slli_epi16)(low, 13);
    const TrellisVector lower_high = METAL_SIM_TRELLIS(slli_epi16)(high, 13);
    for (uint part = 0; part < 2; ++part)
      value[part] = trellis_round(METAL_SIM_TRELLIS(add_ps)(trellis_unpack(lower_low, upper_low, part),
                                                            trellis_unpack(lower_high, upper_high, part)));
  }
}

/// In place of the first and the last four elements of each 128 bits: whole runs, in their order.
template <bool HALVES>
METAL_FUNC void trellis_order(TrellisFloats (&value)[2]) {
#if defined(__AVX512BW__)
  const auto take = [&](__m512i places) {
    return _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(value[0]), places, _mm512_castps_pd(value[1])));
  };
  const TrellisFloats first =
      take(HALVES ? _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 10, 11) : _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11));
  value[1] =
      take(HALVES ? _mm512_setr_epi64(4, 5, 6, 7, 12, 13, 14, 15) : _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15));
  value[0] = first;
#else
  if constexpr (!HALVES) {
    const TrellisFloats first = _mm256_permute2f128_ps(value[0], value[1], 0x20);
    value[1] = _mm256_permute2f128_ps(value[0], value[1], 0x31);
    value[0] = first;
  }
#endif
}

/// The values of runs RUN, RUN + 1, ... of a tile, each two (AVX2: one) of them a vector of floats.
template <uint HALF_BITS, uint CODEBOOK, uint RUN, uint RUNS>
METAL_FUNC void trellis_runs(const uint* tile, TrellisFloats (&value)[2 * RUNS / TRELLIS_LANES]) {
  TrellisFloats two[2];
  trellis_values<CODEBOOK>(trellis_states<HALF_BITS, RUN>(tile), two);
  trellis_order<TrellisPlaces<HALF_BITS, RUN>::HALVES>(two);
  value[0] = two[0];
  value[1] = two[1];
  if constexpr (RUNS > TRELLIS_LANES) {
    static_assert(RUNS == 2 * TRELLIS_LANES);
    trellis_values<CODEBOOK>(trellis_states<HALF_BITS, RUN + TRELLIS_LANES>(tile), two);
    trellis_order<TrellisPlaces<HALF_BITS, RUN + TRELLIS_LANES>::HALVES>(two);
    value[2] = two[0];
    value[3] = two[1];
  }
}

/// The 256 values of a tile, in the ring's order.
template <uint HALF_BITS, uint CODEBOOK, uint RUN = 0>
METAL_FUNC void trellis_decode_tile(const uint* tile, float* value) {
  TrellisFloats run[8 / TRELLIS_LANES];
  trellis_runs<HALF_BITS, CODEBOOK, RUN, 4>(tile, run);
  for (uint i = 0; i < 8 / TRELLIS_LANES; ++i)
    METAL_SIM_TRELLIS(storeu_ps)(value + 8 * RUN + 4 * TRELLIS_LANES * i, run[i]);
  if constexpr (RUN + 4 < 32)
    trellis_decode_tile<HALF_BITS, CODEBOOK, RUN + 4>(tile, value);
}

/// trellis_add_tile of formats/trellis.h: sum[r][8 * column + i] += values of the column's four runs times x[r]. Memory
/// is asked for the tile `next` words further on: it is a page or more away, where the processor's own prefetching
/// ends. At the end of the codes that is beyond them, which does no harm: a prefetch cannot fault.
template <uint HALF_BITS, uint CODEBOOK, uint ROWS, uint RUN = 0>
METAL_FUNC void trellis_add_tile(const uint* tile, size_t next, const float (*x)[32], uint count, float (*sum)[64]) {
  constexpr uint VECTORS = 8 / TRELLIS_LANES, ELEMENTS = 4 * TRELLIS_LANES, LINE = 16; // words of a cache line
  if constexpr (RUN == 0)
    for (uint word = 0; word < 4 * HALF_BITS; word += LINE)
      __builtin_prefetch(tile + next + word);
  TrellisFloats run[VECTORS];
  trellis_runs<HALF_BITS, CODEBOOK, RUN, 4>(tile, run);
  for (uint r = 0; r < (ROWS == 1 ? 1 : count); ++r) {
    float* to = sum[r] + 2 * RUN;
#if defined(__AVX512BW__)
    TrellisFloats total = _mm512_mul_ps(run[0], _mm512_loadu_ps(x[r]));
    total = _mm512_fmadd_ps(run[1], _mm512_loadu_ps(x[r] + ELEMENTS), total);
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(total), _mm512_extractf32x8_ps(total, 1));
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), two));
#else
    TrellisFloats total = _mm256_loadu_ps(to);
    for (uint i = 0; i < VECTORS; ++i)
      total = _mm256_fmadd_ps(run[i], _mm256_loadu_ps(x[r] + ELEMENTS * i), total);
    _mm256_storeu_ps(to, total);
#endif
  }
  if constexpr (RUN + 4 < 32)
    trellis_add_tile<HALF_BITS, CODEBOOK, ROWS, RUN + 4>(tile, next, x, count, sum);
}

#undef METAL_SIM_TRELLIS

} // namespace metal_sim
#endif
