// Dot products along K for an engine whose simdgroup is one thread: what a GPU's lanes share out, the processor's
// vectors do. Called by the kernels' tiles/dot.h.
#pragma once
#include "native_vector.h"

namespace metal_sim {

#if defined(__AVX512F__)
using DotVector = Float16;
METAL_FUNC Float16 dot_load(const float* from) { return __builtin_bit_cast(Float16, _mm512_loadu_ps(from)); }
METAL_FUNC Float16 dot_load(const bfloat* from) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return __builtin_bit_cast(Float16, _mm512_slli_epi32(words, 16));
}
METAL_FUNC Float16 dot_load(const half* from) {
  return __builtin_bit_cast(Float16, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
METAL_FUNC Float16 round_to_half(Float16 v) { return join(round_to_half(low(v)), round_to_half(high(v))); }
#else
using DotVector = Float8;
template <typename T>
METAL_FUNC Float8 dot_load(const T* from) {
  return load8(from);
}
#endif
constexpr uint DOT_LANES = sizeof(DotVector) / sizeof(float);

/// Vectors of products whose sum is kept in fp16 before it is added in fp32, where accumulation is in fp16.
constexpr uint FP16_VECTORS = 2;

/// acc[r][c] += w[r] . x[c] over whole vectors of K, lane by lane; returns where it stopped. Meanwhile asks memory for
/// the rows `next` elements further on, which the caller reads next: the processor's own prefetching ends with each
/// row's page (bench/moe_layer.py: 1.15 to 1.3 times as fast from 4 to 128 tokens). Beyond the last row it asks for
/// nothing that is read, which does no harm: a prefetch cannot fault.
template <bool FP16, uint R, uint C, typename T>
METAL_FUNC uint dot_whole_vectors(const T* const (&w)[R], ulong next, const T* const (&x)[C], uint K,
                                  DotVector (&acc)[R][C]) {
  uint k = 0;
#if defined(__AVX512BF16__)
  if constexpr (metal::is_same_v<T, bfloat>) {
    for (; k + 2 * DOT_LANES <= K; k += 2 * DOT_LANES) {
      __m512bh xs[C];
      for (uint c = 0; c < C; ++c)
        xs[c] = __builtin_bit_cast(__m512bh, _mm512_loadu_si512(x[c] + k));
      for (uint r = 0; r < R; ++r) {
        const __m512bh ws = __builtin_bit_cast(__m512bh, _mm512_loadu_si512(w[r] + k));
        __builtin_prefetch(w[r] + next + k);
        for (uint c = 0; c < C; ++c)
          acc[r][c] = __builtin_bit_cast(Float16, _mm512_dpbf16_ps(__builtin_bit_cast(__m512, acc[r][c]), ws, xs[c]));
      }
    }
    return k;
  }
#endif
  if constexpr (FP16) {
    constexpr uint RUN = FP16_VECTORS * DOT_LANES;
    for (; k + RUN <= K; k += RUN)
      for (uint r = 0; r < R; ++r)
        for (uint c = 0; c < C; ++c) {
          DotVector part = {};
          for (uint i = 0; i < RUN; i += DOT_LANES)
            part = round_to_half(part + dot_load(w[r] + k + i) * dot_load(x[c] + k + i));
          acc[r][c] += part;
        }
    return k;
  }
  for (; k + DOT_LANES <= K; k += DOT_LANES) {
    DotVector xs[C];
    for (uint c = 0; c < C; ++c)
      xs[c] = dot_load(x[c] + k);
    for (uint r = 0; r < R; ++r) {
      const DotVector ws = dot_load(w[r] + k);
      __builtin_prefetch(w[r] + next + k);
      for (uint c = 0; c < C; ++c)
        acc[r][c] += ws * xs[c];
    }
  }
  return k;
}

/// sum[r][c] = w[r] . x[c] over K elements.
template <bool FP16, uint R, uint C, typename T>
METAL_FUNC void dot_rows(const T* const (&w)[R], ulong next, const T* const (&x)[C], uint K, float (&total)[R][C]) {
  DotVector acc[R][C] = {};
  const uint whole = dot_whole_vectors<FP16>(w, next, x, K, acc);
  for (uint r = 0; r < R; ++r)
    for (uint c = 0; c < C; ++c) {
      float rest = 0.0f;
      for (uint k = whole; k < K; ++k)
        rest += float(w[r][k]) * float(x[c][k]);
      total[r][c] = sum(acc[r][c]) + rest;
    }
}

} // namespace metal_sim
