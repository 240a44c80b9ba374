// Barriers and simdgroup functions of the native engine: a threadgroup is one thread and a simdgroup one lane, so every
// function of a simdgroup is that of a single value.
#pragma once

#include "functions.h"

namespace metal {

METAL_FUNC void threadgroup_barrier(mem_flags) {}
METAL_FUNC void simdgroup_barrier(mem_flags) {}

#define METAL_SIM_REDUCTION(NAME)                                                                                      \
  template <typename T>                                                                                                \
  METAL_FUNC T NAME(T value) {                                                                                         \
    return value;                                                                                                      \
  }
METAL_SIM_REDUCTION(simd_sum)
METAL_SIM_REDUCTION(simd_product)
METAL_SIM_REDUCTION(simd_min)
METAL_SIM_REDUCTION(simd_max)
METAL_SIM_REDUCTION(simd_and)
METAL_SIM_REDUCTION(simd_or)
METAL_SIM_REDUCTION(simd_xor)
METAL_SIM_REDUCTION(simd_prefix_inclusive_sum)
METAL_SIM_REDUCTION(simd_prefix_inclusive_product)
METAL_SIM_REDUCTION(simd_broadcast_first)
#undef METAL_SIM_REDUCTION

template <typename T>
METAL_FUNC T simd_prefix_exclusive_sum(T) {
  return T(0);
}
template <typename T>
METAL_FUNC T simd_prefix_exclusive_product(T) {
  return T(1);
}

#define METAL_SIM_SHUFFLE(NAME)                                                                                        \
  template <typename T>                                                                                                \
  METAL_FUNC T NAME(T value, ushort) {                                                                                 \
    return value;                                                                                                      \
  }
METAL_SIM_SHUFFLE(simd_broadcast)
METAL_SIM_SHUFFLE(simd_shuffle)
METAL_SIM_SHUFFLE(simd_shuffle_xor)
METAL_SIM_SHUFFLE(simd_shuffle_up)
METAL_SIM_SHUFFLE(simd_shuffle_down)
METAL_SIM_SHUFFLE(simd_shuffle_rotate_up)
METAL_SIM_SHUFFLE(simd_shuffle_rotate_down)
#undef METAL_SIM_SHUFFLE

template <typename T>
METAL_FUNC T simd_shuffle_and_fill_up(T value, T fill, ushort delta) {
  return delta == 0 ? value : fill;
}
template <typename T>
METAL_FUNC T simd_shuffle_and_fill_down(T value, T fill, ushort delta) {
  return delta == 0 ? value : fill;
}

METAL_FUNC bool simd_all(bool value) { return value; }
METAL_FUNC bool simd_any(bool value) { return value; }
METAL_FUNC bool simd_is_first() { return true; }
METAL_FUNC simd_vote simd_ballot(bool value) { return simd_vote(value ? 1u : 0u); }
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_vote(1u); }

} // namespace metal
