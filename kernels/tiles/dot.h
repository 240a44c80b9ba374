// The inner loop of the GEMV families: dot products along K of R weight rows with C activation rows.
//
// A lane takes LANE_ELEMENTS consecutive elements at a time (16 bytes of a 16-bit type), the lanes of a simdgroup
// interleaved, so that a simdgroup reads each row in one contiguous stream. What is left of K goes element by element.
#pragma once
#include "rows.h"

#ifdef METAL_SIM_NATIVE
// One thread has the whole row, and the engine the loop over the processor's vectors.
template <bool VECTORIZED, typename Acc, uint R, uint C, typename T>
inline void dot_rows(thread const Rows<T, R>& w, thread const Rows<T, C>& x, uint K, uint, thread float (&sum)[R][C]) {
  metal_sim::dot_rows<sizeof(Acc) == 2>(w.row, w.next, x.row, K, sum);
}
#else

constexpr constant uint LANE_ELEMENTS = 8;

/// sum[r][c] = this lane's part of w.row[r] . x.row[c]; the simdgroup's sum over lanes is the dot product.
/// Acc = half: products and sums of up to LANE_ELEMENTS elements in fp16, those sums added in fp32.
template <bool VECTORIZED, typename Acc, uint R, uint C, typename T>
inline void dot_rows(thread const Rows<T, R>& w, thread const Rows<T, C>& x, uint K, uint lane,
                     thread float (&sum)[R][C]) {
  for (uint r = 0; r < R; ++r)
    for (uint c = 0; c < C; ++c)
      sum[r][c] = 0.0f;

  const uint whole = K / LANE_ELEMENTS * LANE_ELEMENTS;
  for (uint k = lane * LANE_ELEMENTS; k < whole; k += SIMD_WIDTH * LANE_ELEMENTS) {
    float xs[C][LANE_ELEMENTS];
    for (uint c = 0; c < C; ++c)
      load_elements<LANE_ELEMENTS, VECTORIZED>(x.row[c] + k, xs[c]);
    for (uint r = 0; r < R; ++r) {
      float ws[LANE_ELEMENTS];
      load_elements<LANE_ELEMENTS, VECTORIZED>(w.row[r] + k, ws);
      for (uint c = 0; c < C; ++c) {
        Acc part = Acc(0);
        for (uint i = 0; i < LANE_ELEMENTS; ++i)
          part = fma(Acc(ws[i]), Acc(xs[c][i]), part);
        sum[r][c] += float(part);
      }
    }
  }
  for (uint k = whole + lane; k < K; k += SIMD_WIDTH)
    for (uint r = 0; r < R; ++r)
      for (uint c = 0; c < C; ++c)
        sum[r][c] += float(w.row[r][k]) * float(x.row[c][k]);
}
#endif
