// The Hadamard transform of 128 values, natural order, over sqrt(128), which makes it its own inverse.
//
//   H[i, j] = (-1)^popcount(i & j) / sqrt(128)
//
// Seven stages of sums and differences of values that are 1, 2, 4, ... 64 apart, then one product: the order in which
// python/metal_moe/formats/hadamard.py rounds. A simdgroup transforms 128 values: a lane holds HADAMARD_LANE_VALUES
// consecutive ones, the first stages are in its registers, the others exchange with another lane.
#pragma once
#include "simd.h"

SHARED_CONSTANT uint HADAMARD_BLOCK = 128;

#ifdef __METAL_VERSION__

constexpr constant float HADAMARD_NORM = 0.08838834764831845f; // 1 / sqrt(128)
constexpr constant uint HADAMARD_LANE_VALUES = HADAMARD_BLOCK / SIMD_WIDTH;

/// In place, without the factor. All lanes must take part.
inline void hadamard_sums(thread float (&value)[HADAMARD_LANE_VALUES], uint lane) {
  UNROLL
  for (uint width = 1; width < HADAMARD_LANE_VALUES; width *= 2) {
    for (uint begin = 0; begin < HADAMARD_LANE_VALUES; begin += 2 * width) {
      for (uint i = begin; i < begin + width; ++i) {
        const float low = value[i], high = value[i + width];
        value[i] = low + high;
        value[i + width] = low - high;
      }
    }
  }
#if SIMD_WIDTH == 1
  (void)lane;
#else
  UNROLL
  for (uint distance = 1; distance < SIMD_WIDTH; distance *= 2) {
    UNROLL
    for (uint i = 0; i < HADAMARD_LANE_VALUES; ++i) {
      const float other = simd_shuffle_xor(value[i], ushort(distance));
      value[i] = (lane & distance) != 0 ? other - value[i] : value[i] + other;
    }
  }
#endif
}

#endif
