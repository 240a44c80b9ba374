// Sums over the lanes of a simdgroup of several values at once.
//
// simd_sum gives one sum to all lanes, in log2(SIMD_WIDTH) exchanges. Where lane e wants the sum of value e alone, two
// lanes can halve the number of values with each exchange: COUNT values take COUNT - 1 exchanges and one more for each
// doubling from COUNT to SIMD_WIDTH, instead of log2(SIMD_WIDTH) * COUNT.
#pragma once
#include "simd.h"

/// COUNT sums over lanes: e of them, e = lane, in each lane; with one-thread simdgroups all of them in the one lane.
template <uint COUNT>
struct LaneSums {
  float value[SIMD_WIDTH == 1 ? COUNT : 1];

  float at(uint e) thread const { return value[SIMD_WIDTH == 1 ? e : 0]; }
};

constexpr uint next_power_of_two(uint n) {
  uint power = 1;
  while (power < n)
    power *= 2;
  return power;
}

/// Exchanges HALF values with the lane at DISTANCE, and so on down to one value. Distances begin at half a simdgroup
/// whatever the number of values: each sum is then formed in the same order, and a result does not depend on what else
/// was summed with it.
template <uint HALF, uint DISTANCE>
struct LaneFold {
  template <uint COUNT>
  static void apply(thread float (&v)[COUNT], uint lane) {
    const bool upper = (lane & DISTANCE) != 0;
    UNROLL
    for (uint i = 0; i < HALF; ++i) {
      // Not `upper ? v[i] : v[i + HALF]`: a choice of places, not of values, takes the array out of registers.
      const float low = v[i], high = v[i + HALF];
      const float keep = upper ? high : low, give = upper ? low : high;
      v[i] = keep + simd_shuffle_xor(give, ushort(DISTANCE));
    }
    LaneFold<HALF / 2, DISTANCE / 2>::apply(v, lane);
  }
};
template <uint DISTANCE>
struct LaneFold<0, DISTANCE> {
  template <uint COUNT>
  static void apply(thread float (&v)[COUNT], uint) {
    UNROLL
    for (uint distance = DISTANCE; distance > 0; distance /= 2)
      v[0] += simd_shuffle_xor(v[0], ushort(distance));
  }
};

/// Sums over lanes of N rows of C values, from row FIRST on; the sum of row FIRST + i, column c is number i * C + c.
/// All lanes must take part.
template <uint FIRST, uint N, uint R, uint C>
inline LaneSums<N * C> sum_lanes(thread const float (&sum)[R][C], uint lane) {
  LaneSums<N * C> result;
#if SIMD_WIDTH == 1
  (void)lane;
  for (uint e = 0; e < N * C; ++e)
    result.value[e] = sum[FIRST + e / C][e % C];
#else
  constexpr uint COUNT = next_power_of_two(N * C);
  static_assert(COUNT <= SIMD_WIDTH, "one sum per lane");
  float v[COUNT];
  UNROLL
  for (uint e = 0; e < COUNT; ++e)
    v[e] = e < N * C ? sum[FIRST + e / C][e % C] : 0.0f;
  LaneFold<COUNT / 2, SIMD_WIDTH / 2>::apply(v, lane);
  // Sum e is in the lanes from e * (SIMD_WIDTH / COUNT) on.
  result.value[0] = simd_shuffle(v[0], ushort(lane % COUNT * (SIMD_WIDTH / COUNT)));
#endif
  return result;
}
