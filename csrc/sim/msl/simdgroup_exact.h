// Barriers and simdgroup functions of the exact engine: lanes publish their values and meet. Reductions go over the
// active lanes in lane order, so that every schedule gives the same bits.
#pragma once

#include "exact_services.h"
#include "functions.h"

namespace metal {

METAL_FUNC void threadgroup_barrier(mem_flags memory) { metal_sim::exact_threadgroup_barrier(uint32_t(memory)); }
METAL_FUNC void simdgroup_barrier(mem_flags memory) { metal_sim::exact_simdgroup_barrier(uint32_t(memory)); }

} // namespace metal

namespace metal_sim {

/// What every lane of the simdgroup published.
template <typename T>
struct Lanes {
  static_assert(sizeof(T) <= MAX_EXCHANGE_BYTES, "a simdgroup function takes at most 1024 bytes");
  T value[SIMD_WIDTH];
  uint64_t active;

  METAL_SIM_UNCHECKED Lanes(const char* operation, T own) {
    active = exact_exchange(operation, &own, sizeof(T), value);
  }
  METAL_FUNC bool has(uint32_t lane) const { return (active >> lane & 1) != 0; }
};

/// The value of another lane. A lane that took no part has none: a thread that reads it gets bytes of 0xFF, which is
/// NaN.
template <typename T>
METAL_SIM_UNCHECKED inline T read_lane(const char* operation, T own, uint32_t lane) {
  T result;
  if (!exact_exchange_one(operation, &own, sizeof(T), lane, &result))
    __builtin_memset(static_cast<void*>(&result), 0xFF, sizeof(T));
  return result;
}

/// Combines the active lanes below `end` in lane order; `start` where there are none.
template <typename T, typename Combine>
METAL_SIM_UNCHECKED inline T reduce(const Lanes<T>& lanes, uint32_t end, T start, Combine combine) {
  T result = start;
  bool first = true;
  for (uint32_t lane = 0; lane < end; ++lane)
    if (lanes.has(lane)) {
      result = first ? lanes.value[lane] : combine(result, lanes.value[lane]);
      first = false;
    }
  return result;
}

} // namespace metal_sim

namespace metal {

#define METAL_SIM_REDUCTION(NAME, EXPRESSION)                                                                          \
  template <typename T>                                                                                                \
  METAL_SIM_UNCHECKED inline T NAME(T value) {                                                                         \
    const metal_sim::Lanes<T> lanes(#NAME, value);                                                                     \
    return metal_sim::reduce(lanes, SIMD_WIDTH, value, [](T a, T b) METAL_SIM_UNCHECKED { return T(EXPRESSION); });    \
  }
METAL_SIM_REDUCTION(simd_sum, a + b)
METAL_SIM_REDUCTION(simd_product, a* b)
METAL_SIM_REDUCTION(simd_min, min(a, b))
METAL_SIM_REDUCTION(simd_max, max(a, b))
METAL_SIM_REDUCTION(simd_and, a& b)
METAL_SIM_REDUCTION(simd_or, a | b)
METAL_SIM_REDUCTION(simd_xor, a ^ b)
#undef METAL_SIM_REDUCTION

#define METAL_SIM_SCAN(NAME, START, EXPRESSION)                                                                        \
  template <typename T>                                                                                                \
  METAL_SIM_UNCHECKED inline T simd_prefix_inclusive_##NAME(T value) {                                                 \
    const metal_sim::Lanes<T> lanes("simd_prefix_inclusive_" #NAME, value);                                            \
    return metal_sim::reduce(lanes, metal_sim::exact_lane() + 1, T(START),                                             \
                             [](T a, T b) METAL_SIM_UNCHECKED { return T(EXPRESSION); });                              \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  METAL_SIM_UNCHECKED inline T simd_prefix_exclusive_##NAME(T value) {                                                 \
    const metal_sim::Lanes<T> lanes("simd_prefix_exclusive_" #NAME, value);                                            \
    return metal_sim::reduce(lanes, metal_sim::exact_lane(), T(START),                                                 \
                             [](T a, T b) METAL_SIM_UNCHECKED { return T(EXPRESSION); });                              \
  }
METAL_SIM_SCAN(sum, 0, a + b)
METAL_SIM_SCAN(product, 1, a* b)
#undef METAL_SIM_SCAN

template <typename T>
METAL_FUNC T simd_broadcast(T value, ushort lane) {
  return metal_sim::read_lane("simd_broadcast", value, lane);
}
template <typename T>
METAL_FUNC T simd_shuffle(T value, ushort lane) {
  return metal_sim::read_lane("simd_shuffle", value, lane);
}
template <typename T>
METAL_FUNC T simd_shuffle_xor(T value, ushort mask) {
  return metal_sim::read_lane("simd_shuffle_xor", value, metal_sim::exact_lane() ^ mask);
}
/// Lanes below `delta` keep their own value, as on Apple's GPUs.
template <typename T>
METAL_FUNC T simd_shuffle_up(T value, ushort delta) {
  const uint lane = metal_sim::exact_lane();
  return metal_sim::read_lane("simd_shuffle_up", value, lane < delta ? lane : lane - delta);
}
template <typename T>
METAL_FUNC T simd_shuffle_down(T value, ushort delta) {
  const uint lane = metal_sim::exact_lane();
  return metal_sim::read_lane("simd_shuffle_down", value, lane + delta >= SIMD_WIDTH ? lane : lane + delta);
}
template <typename T>
METAL_FUNC T simd_shuffle_rotate_up(T value, ushort delta) {
  return metal_sim::read_lane("simd_shuffle_rotate_up", value, (metal_sim::exact_lane() - delta) % SIMD_WIDTH);
}
template <typename T>
METAL_FUNC T simd_shuffle_rotate_down(T value, ushort delta) {
  return metal_sim::read_lane("simd_shuffle_rotate_down", value, (metal_sim::exact_lane() + delta) % SIMD_WIDTH);
}
/// Lanes below `delta` get the last `delta` lanes' fill.
template <typename T>
METAL_FUNC T simd_shuffle_and_fill_up(T value, T fill, ushort delta) {
  const uint lane = metal_sim::exact_lane();
  const T shifted = metal_sim::read_lane("simd_shuffle_and_fill_up", value, (lane - delta) % SIMD_WIDTH);
  const T filled = metal_sim::read_lane("simd_shuffle_and_fill_up", fill, (lane - delta) % SIMD_WIDTH);
  return lane < delta ? filled : shifted;
}
template <typename T>
METAL_FUNC T simd_shuffle_and_fill_down(T value, T fill, ushort delta) {
  const uint lane = metal_sim::exact_lane();
  const T shifted = metal_sim::read_lane("simd_shuffle_and_fill_down", value, (lane + delta) % SIMD_WIDTH);
  const T filled = metal_sim::read_lane("simd_shuffle_and_fill_down", fill, (lane + delta) % SIMD_WIDTH);
  return lane + delta >= SIMD_WIDTH ? filled : shifted;
}

/// One bit per active lane whose value is true.
METAL_SIM_UNCHECKED inline simd_vote::vote_t simd_votes(const char* operation, bool value, uint64_t& active) {
  const metal_sim::Lanes<bool> lanes(operation, value);
  simd_vote::vote_t votes = 0;
  for (uint lane = 0; lane < SIMD_WIDTH; ++lane)
    if (lanes.has(lane) && lanes.value[lane])
      votes |= simd_vote::vote_t(1) << lane;
  active = lanes.active;
  return votes;
}

METAL_SIM_UNCHECKED inline simd_vote simd_ballot(bool value) {
  uint64_t active;
  return simd_vote(simd_votes("simd_ballot", value, active));
}
METAL_SIM_UNCHECKED inline bool simd_all(bool value) {
  uint64_t active;
  const simd_vote::vote_t votes = simd_votes("simd_all", value, active);
  return votes == active;
}
METAL_SIM_UNCHECKED inline bool simd_any(bool value) {
  uint64_t active;
  return simd_votes("simd_any", value, active) != 0;
}
METAL_SIM_UNCHECKED inline simd_vote simd_active_threads_mask() {
  uint64_t active;
  simd_votes("simd_active_threads_mask", true, active);
  return simd_vote(active);
}
METAL_SIM_UNCHECKED inline bool simd_is_first() {
  uint64_t active;
  simd_votes("simd_is_first", true, active);
  return (active & ((uint64_t(1) << metal_sim::exact_lane()) - 1)) == 0;
}
template <typename T>
METAL_SIM_UNCHECKED inline T simd_broadcast_first(T value) {
  const metal_sim::Lanes<T> lanes("simd_broadcast_first", value);
  return lanes.value[__builtin_ctzll(lanes.active)];
}

} // namespace metal
