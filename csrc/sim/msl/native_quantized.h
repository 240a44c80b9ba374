// Dot products of quantised rows for an engine whose simdgroup is one thread. Called by the kernels'
// moe/gemv_quantized.h, whose decoders (`Run`) say what a code is worth; here whole vectors of codes are decoded.
#pragma once
#include "native_dot.h"

namespace metal_sim {

/// Elements that every format decodes together; kernels/formats/quantized.h.
constexpr uint QUANTIZED_RUN = 32;
/// The longest group of one scale.
constexpr uint QUANTIZED_GROUP = 128;

/// kernels/formats/quantized.h: WeightFormat, ScaleFormat.
enum QuantizedFormat : uint { QUANTIZED_AFFINE = 1, QUANTIZED_MXFP4 = 2, QUANTIZED_MXFP8 = 3, QUANTIZED_NVFP4 = 4 };

METAL_FUNC float quantized_scale(const uchar* from, uint index, uint type) {
  if (type == 0) {
    float value;
    __builtin_memcpy(&value, from + 4 * index, sizeof value);
    return value;
  }
  uint16_t bits;
  __builtin_memcpy(&bits, from + 2 * index, sizeof bits);
  return type == 1 ? float(__builtin_bit_cast(half, bits)) : __builtin_bit_cast(float, uint32_t(bits) << 16);
}

METAL_FUNC float quantized_e8m0(uint code) {
  return __builtin_bit_cast(float, code == 0 ? 0x00400000u : code == 255 ? 0x7FC00000u : code << 23);
}

METAL_FUNC float quantized_e4m3(uint code) {
  const uint16_t bits = uint16_t((code & 0x80) << 8 | (code & 0x7F) << 7);
  return (code & 0x7F) == 0x7F ? __builtin_nanf("") : float(__builtin_bit_cast(half, bits)) * 256.0f;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

/// For the 16 codes of half a run: the word in which each begins, and where in it.
template <uint BITS>
struct CodePlaces {
  alignas(64) int32_t word[2][16];
  alignas(64) int32_t next[2][16];
  alignas(64) int32_t shift[2][16];
  alignas(64) int32_t next_shift[2][16];

  constexpr CodePlaces() : word(), next(), shift(), next_shift() {
    for (uint h = 0; h < 2; ++h)
      for (uint i = 0; i < 16; ++i) {
        const uint bit = (16 * h + i) * BITS;
        word[h][i] = int32_t(bit / 32);
        next[h][i] = int32_t(bit / 32 + 1 < BITS ? bit / 32 + 1 : BITS - 1);
        shift[h][i] = int32_t(bit % 32);
        next_shift[h][i] = int32_t(32 - bit % 32); // 32 shifts everything out
      }
  }
};
template <uint BITS>
constexpr CodePlaces<BITS> code_places{};

/// What the codes of up to 4 bits stand for, by the low four bits of whatever holds them: a permutation of 16 floats
/// looks at no others, so codes need not be cut out.
template <uint FORMAT, uint BITS>
struct CodeValues {
  alignas(64) float value[16];

  constexpr CodeValues() : value() {
    constexpr float E2M1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    for (uint i = 0; i < 16; ++i)
      value[i] = FORMAT == QUANTIZED_AFFINE ? float(i & ((1u << BITS) - 1)) : (i & 8 ? -E2M1[i & 7] : E2M1[i & 7]);
  }
};
template <uint FORMAT, uint BITS>
constexpr CodeValues<FORMAT, BITS> code_values{};

/// The codes of half a run, in the low bits of each element; above them there may be others.
template <uint BITS>
METAL_FUNC __m512i load_half_run(const uchar* run, uint h) {
  const CodePlaces<BITS>& places = code_places<BITS>;
  if constexpr (BITS == 8)
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run) + h));
  __m512i words;
  if constexpr (BITS == 4)
    words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run)));
  else
    words = _mm512_maskz_loadu_epi32(__mmask16((1u << BITS) - 1), run);
  const __m512i low = _mm512_permutexvar_epi32(_mm512_load_si512(places.word[h]), words);
  const __m512i codes = _mm512_srlv_epi32(low, _mm512_load_si512(places.shift[h]));
  if constexpr (32 % BITS == 0)
    return codes;
  const __m512i high = _mm512_permutexvar_epi32(_mm512_load_si512(places.next[h]), words);
  return _mm512_or_si512(codes, _mm512_sllv_epi32(high, _mm512_load_si512(places.next_shift[h])));
}

/// The weights of a group: up to 4 bits a table of all of them, made once per group.
template <uint FORMAT, uint BITS>
struct GroupWeights {
  __m512 first;
  __m512 second;

  METAL_FUNC void start(float scale, float other) {
    first = _mm512_set1_ps(scale);
    second = _mm512_set1_ps(other);
    if constexpr (BITS <= 4) {
      const __m512 values = _mm512_load_ps(code_values<FORMAT, BITS>.value);
      if constexpr (FORMAT == QUANTIZED_AFFINE) {
        first = _mm512_fmadd_ps(values, first, second);
      } else {
        first = _mm512_mul_ps(values, first);
        second = _mm512_mul_ps(values, second);
      }
    }
  }

  /// Of elements 16 h .. 16 h + 15 of a run.
  METAL_FUNC __m512 at(const uchar* run, uint h) const {
    const __m512i codes = load_half_run<BITS>(run, h);
    if constexpr (BITS <= 4) {
      return _mm512_permutexvar_ps(codes, FORMAT == QUANTIZED_NVFP4 && h == 1 ? second : first);
    } else if constexpr (FORMAT == QUANTIZED_MXFP8) {
      const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi32(0x7F));
      const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi32(0x80));
      const __m512i bits = _mm512_or_si512(_mm512_slli_epi32(magnitude, 7), _mm512_slli_epi32(sign, 8));
      const __m512 value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
      const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F));
      const __m512 element = _mm512_mul_ps(value, _mm512_set1_ps(256.0f));
      return _mm512_mul_ps(_mm512_mask_blend_ps(nan, element, _mm512_set1_ps(__builtin_nanf(""))), first);
    } else {
      const __m512i code = _mm512_and_si512(codes, _mm512_set1_epi32((1 << BITS) - 1));
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), first, second);
    }
  }
};

#endif

/// total[r][c] = row r . x[c] over runs begin .. end - 1, begin at the start of a group. `next`: bytes of codes to the
/// row that takes a row's place, see dot_whole_vectors.
template <typename Run, uint R, uint C, typename T>
METAL_FUNC void dot_quantized(const uchar* const (&codes)[R], const uchar* const (&scales)[R],
                              const uchar* const (&biases)[R], ulong next, uint group_shift, uint scale_type,
                              const T* const (&x)[C], uint begin, uint end, float (&total)[R][C]) {
  constexpr uint RUN_BYTES = Run::BITS * QUANTIZED_RUN / 8;
  DotVector acc[R][C] = {};
  const uint group_runs = 1u << group_shift;
  for (uint first = begin; first < end; first += group_runs) {
    // As fp32, once for all rows.
    alignas(64) float xs[C][QUANTIZED_GROUP];
    const uint runs = end - first < group_runs ? end - first : group_runs;
    for (uint c = 0; c < C; ++c)
      for (uint i = 0; i < runs * QUANTIZED_RUN; i += DOT_LANES) {
        const DotVector v = dot_load(x[c] + first * QUANTIZED_RUN + i);
        __builtin_memcpy(xs[c] + i, &v, sizeof v);
      }
    const uint group = first >> group_shift;
    for (uint r = 0; r < R; ++r) {
      float scale, other = 0.0f;
      if constexpr (Run::FORMAT == QUANTIZED_AFFINE) {
        scale = quantized_scale(scales[r], group, scale_type);
        other = quantized_scale(biases[r], group, scale_type);
      } else if constexpr (Run::FORMAT == QUANTIZED_NVFP4) {
        scale = quantized_e4m3(scales[r][2 * group]);
        other = quantized_e4m3(scales[r][2 * group + 1]);
      } else {
        scale = quantized_e8m0(scales[r][group]);
      }
      const uchar* from = codes[r] + first * RUN_BYTES;
      __builtin_prefetch(from + next);
#if defined(__AVX512F__) && defined(__AVX512BW__)
      GroupWeights<Run::FORMAT, Run::BITS> weights;
      weights.start(scale, other);
      for (uint run = 0; run < runs; ++run)
        for (uint h = 0; h < 2; ++h) {
          const Float16 w = __builtin_bit_cast(Float16, weights.at(from + run * RUN_BYTES, h));
          for (uint c = 0; c < C; ++c)
            acc[r][c] += w * dot_load(xs[c] + run * QUANTIZED_RUN + 16 * h);
        }
#else
      for (uint run = 0; run < runs; ++run) {
        Run decoder;
        __builtin_memcpy(decoder.words, from + run * RUN_BYTES, RUN_BYTES);
        constexpr float UNIT = Run::FORMAT == QUANTIZED_NVFP4 ? 16384.0f : 1.0f; // of NvRun's elements
        decoder.first = scale * UNIT;
        decoder.second = other * UNIT;
        alignas(64) float w[QUANTIZED_RUN];
        for (uint i = 0; i < QUANTIZED_RUN; ++i)
          w[i] = decoder.weight(i);
        for (uint i = 0; i < QUANTIZED_RUN; i += DOT_LANES)
          for (uint c = 0; c < C; ++c)
            acc[r][c] += dot_load(w + i) * dot_load(xs[c] + run * QUANTIZED_RUN + i);
      }
#endif
    }
  }
  for (uint r = 0; r < R; ++r)
    for (uint c = 0; c < C; ++c)
      total[r][c] = sum(acc[r][c]);
}

} // namespace metal_sim
