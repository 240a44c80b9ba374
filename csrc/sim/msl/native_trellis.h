// The values of a tile of trellis weights for an engine whose simdgroup is one thread, in the processor's vectors.
// Called by the kernels' formats/trellis.h where vectors of 16-bit elements can be permuted freely; elsewhere that
// header's own loop serves.
#pragma once
#include "native_vector.h"

#if defined(__AVX512BW__)
namespace metal_sim {

/// Where 16 consecutive states lie in a ring's words from a word on, `offset` bits into which the first one's step
/// begins, one word late: the two 16-bit units that each state spans, and how far the pair must be shifted.
template <uint HALF_BITS>
struct TrellisPlaces {
  alignas(64) ushort unit[4][32];
  alignas(64) uint shift[4][16];

  constexpr TrellisPlaces() : unit(), shift() {
    for (uint quarter = 0; quarter < 4; ++quarter)
      for (uint i = 0; i < 16; ++i) {
        const uint begin = 8 * quarter + 16 + (i + 1) * HALF_BITS / 2;
        // A word's earlier unit is its upper half; the pair's earlier unit is to be so too.
        unit[quarter][2 * i] = static_cast<ushort>((begin / 16 + 1) ^ 1);
        unit[quarter][2 * i + 1] = static_cast<ushort>((begin / 16) ^ 1);
        shift[quarter][i] = 16 - begin % 16;
      }
  }
};

/// An fp16 in the low half of each element, normal, as fp32.
METAL_FUNC __m512 trellis_half16(__m512i bits) {
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x8000)), 16);
  const __m512i rest = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7FFF)), 13);
  return _mm512_castsi512_ps(_mm512_or_si512(sign, _mm512_add_epi32(rest, _mm512_set1_epi32(0x38000000))));
}

/// trellis_value of 16 states; CODEBOOK as in formats/trellis.h: 0 3inst, 1 mcg, 2 mul1.
template <uint CODEBOOK>
METAL_FUNC __m512 trellis_value16(__m512i state) {
  __m512 value;
  if constexpr (CODEBOOK == 2) {
    const __m512i product = _mm512_mullo_epi32(state, _mm512_set1_epi32(int(0x83DCD12Du)));
    const __m512i pairs = _mm512_maddubs_epi16(product, _mm512_set1_epi8(1));
    const __m512 bytes = _mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    // 1024 * 887 / 131072 - 10.3828125 is exact: the same sum, rounded once.
    value = _mm512_fmadd_ps(bytes, _mm512_set1_ps(887.0f / 131072.0f), _mm512_set1_ps(-3.453125f));
  } else {
    __m512i product = _mm512_mullo_epi32(state, _mm512_set1_epi32(int(CODEBOOK == 1 ? 0xCBAC1FEDu : 89226354u)));
    if constexpr (CODEBOOK == 0)
      product = _mm512_add_epi32(product, _mm512_set1_epi32(64248484));
    product =
        _mm512_xor_si512(_mm512_and_si512(product, _mm512_set1_epi32(int(0x8FFF8FFFu))), _mm512_set1_epi32(0x3B603B60));
    value = _mm512_add_ps(trellis_half16(product), trellis_half16(_mm512_srli_epi32(product, 16)));
  }
  return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/// The 256 values of a tile, in the ring's order.
template <uint HALF_BITS, uint CODEBOOK>
METAL_FUNC void trellis_decode_tile(const uint* tile, float (&value)[256]) {
  static constexpr TrellisPlaces<HALF_BITS> places;
  constexpr uint WORDS = 4 * HALF_BITS;
  uint ring[WORDS + 17]; // the last word before the first; and a vector may be read from the last one on
  ring[0] = tile[WORDS - 1];
  __builtin_memcpy(ring + 1, tile, WORDS * sizeof(uint));
  for (uint i = WORDS + 1; i < WORDS + 17; ++i)
    ring[i] = 0;
#pragma GCC unroll 4
  for (uint chunk = 0; chunk < 16; ++chunk) {
    const uint bit = 8 * HALF_BITS * chunk;
    const uint quarter = bit / 8 % 4;
    const __m512i words = _mm512_loadu_si512(ring + bit / 32);
    const __m512i pairs = _mm512_permutexvar_epi16(_mm512_load_si512(places.unit[quarter]), words);
    const __m512i states =
        _mm512_and_si512(_mm512_srlv_epi32(pairs, _mm512_load_si512(places.shift[quarter])), _mm512_set1_epi32(0xFFFF));
    _mm512_storeu_ps(value + 16 * chunk, trellis_value16<CODEBOOK>(states));
  }
}

} // namespace metal_sim
#endif
