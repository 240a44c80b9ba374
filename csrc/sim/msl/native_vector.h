// Vectors of the processor, as the native engine's simdgroup matrices and dot products use them: loads of any element
// type as fp32. Written with the compiler's vector extension, which g++ and clang both know, and intrinsics only where
// g++ 12 would convert element by element.
#pragma once
#include "scalar.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace metal_sim {

using Float4 = float __attribute__((vector_size(16)));
using Float8 = float __attribute__((vector_size(32)));
using Float16 = float __attribute__((vector_size(64)));
using Uint8 = uint32_t __attribute__((vector_size(32)));
using Ushort8 = uint16_t __attribute__((vector_size(16)));

METAL_FUNC Float8 load8(const float* from) {
  Float8 v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

METAL_FUNC Float8 load8(const bfloat* from) {
  Ushort8 bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return __builtin_bit_cast(Float8, __builtin_convertvector(bits, Uint8) << 16);
}

METAL_FUNC Float8 load8(const half* from) {
#if defined(__F16C__)
  return __builtin_bit_cast(Float8, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__ARM_NEON)
  float16x8_t bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  const float32x4_t low = vcvt_f32_f16(vget_low_f16(bits)), high = vcvt_f32_f16(vget_high_f16(bits));
  return Float8{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
#else
  Float8 v;
  for (int i = 0; i < 8; ++i)
    v[i] = float(from[i]);
  return v;
#endif
}

/// Each element rounded to the nearest fp16.
METAL_FUNC Float8 round_to_half(Float8 v) {
#if defined(__F16C__)
  return __builtin_bit_cast(Float8,
                            _mm256_cvtph_ps(_mm256_cvtps_ph(__builtin_bit_cast(__m256, v), _MM_FROUND_TO_NEAREST_INT)));
#else
  for (int i = 0; i < 8; ++i)
    v[i] = float(half(v[i]));
  return v;
#endif
}

METAL_FUNC Float16 join(Float8 low, Float8 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
METAL_FUNC Float8 low(Float16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
METAL_FUNC Float8 high(Float16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }

/// Sum of the elements, always in the same order.
METAL_FUNC float sum(Float8 v) {
  const Float4 four = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
METAL_FUNC float sum(Float16 v) { return sum(low(v) + high(v)); }

} // namespace metal_sim
