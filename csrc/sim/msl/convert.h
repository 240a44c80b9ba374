// metal_sim::widen and narrow: N elements of a storage type to float and back, with the processor's conversion
// instructions. g++ does not vectorise loops of _Float16 conversions by itself; for float and bfloat plain loops do.
#pragma once

#include "scalar.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace metal_sim {

#if defined(__F16C__)

template <int N>
METAL_FUNC void widen_half(const half* in, float* out) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= N; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#endif
  for (; i + 8 <= N; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i + 4 <= N; i += 4)
    _mm_storeu_ps(out + i, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < N; ++i)
    out[i] = float(in[i]);
}

template <int N>
METAL_FUNC void narrow_half(const float* in, half* out) {
  constexpr int ROUNDING = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= N; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(in + i), ROUNDING));
#endif
  for (; i + 8 <= N; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), ROUNDING));
  for (; i + 4 <= N; i += 4)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), _mm_cvtps_ph(_mm_loadu_ps(in + i), ROUNDING));
  for (; i < N; ++i)
    out[i] = half(in[i]);
}

#elif defined(__aarch64__)

template <int N>
METAL_FUNC void widen_half(const half* in, float* out) {
  int i = 0;
  for (; i + 4 <= N; i += 4)
    vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(in + i)))));
  for (; i < N; ++i)
    out[i] = float(in[i]);
}

template <int N>
METAL_FUNC void narrow_half(const float* in, half* out) {
  int i = 0;
  for (; i + 4 <= N; i += 4)
    vst1_u16(reinterpret_cast<uint16_t*>(out + i), vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
  for (; i < N; ++i)
    out[i] = half(in[i]);
}

#else

template <int N>
METAL_FUNC void widen_half(const half* in, float* out) {
  for (int i = 0; i < N; ++i)
    out[i] = float(in[i]);
}

template <int N>
METAL_FUNC void narrow_half(const float* in, half* out) {
  for (int i = 0; i < N; ++i)
    out[i] = half(in[i]);
}

#endif

/// out[i] = float(in[i]) for N elements.
template <int N, typename T>
METAL_FUNC void widen(const T* in, float* out) {
  if constexpr (metal::is_same_v<T, half>)
    widen_half<N>(in, out);
  else
    for (int i = 0; i < N; ++i)
      out[i] = float(in[i]);
}

/// out[i] = T(in[i]) for N elements, rounded to nearest even.
template <int N, typename T>
METAL_FUNC void narrow(const float* in, T* out) {
  if constexpr (metal::is_same_v<T, half>)
    narrow_half<N>(in, out);
  else
    for (int i = 0; i < N; ++i)
      out[i] = T(in[i]);
}

} // namespace metal_sim
