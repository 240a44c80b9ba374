// Barriers and simdgroup functions on NVIDIA GPUs: a simdgroup is a warp. All lanes that have not returned must take
// part, as on Apple's GPUs; a kernel that breaks the rule is found by the exact engine.
#pragma once

#include "functions.h"

static_assert(SIMD_WIDTH == 32, "a warp");

namespace metal {

// __syncthreads orders accesses to device memory among the threads of the threadgroup too, whatever the flags.
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

} // namespace metal

namespace metal_sim {

constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

METAL_FUNC uint32_t cuda_lane() {
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

/// The value of another lane, word by word.
template <typename T>
METAL_FUNC T read_lane(T own, uint32_t lane) {
  constexpr int WORDS = (sizeof(T) + 3) / 4;
  uint32_t words[WORDS] = {};
  memcpy(words, &own, sizeof(T));
#pragma unroll
  for (int i = 0; i < WORDS; ++i)
    words[i] = __shfl_sync(ALL_LANES, words[i], lane);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

/// Over all lanes in a butterfly: every lane forms the same sums of the same pairs, so all have the same bits.
template <typename T, typename Combine>
METAL_FUNC T reduce(T value, Combine combine) {
#pragma unroll
  for (uint32_t distance = 1; distance < SIMD_WIDTH; distance *= 2)
    value = combine(value, read_lane(value, cuda_lane() ^ distance));
  return value;
}

/// Of the lanes up to and including this one.
template <typename T, typename Combine>
METAL_FUNC T scan(T value, Combine combine) {
  const uint32_t lane = cuda_lane();
#pragma unroll
  for (uint32_t distance = 1; distance < SIMD_WIDTH; distance *= 2) {
    const T before = read_lane(value, (lane - distance) % SIMD_WIDTH);
    if (lane >= distance)
      value = combine(before, value);
  }
  return value;
}

template <typename T>
inline constexpr bool is_word_v = metal::is_same_v<T, uint32_t> || metal::is_same_v<T, int32_t>;

} // namespace metal_sim

namespace metal {

// Integers of 32 bits have an instruction; bitwise ones take the bits as unsigned.
#define METAL_SIM_REDUCTION(NAME, EXPRESSION, WORD)                                                                    \
  template <typename T>                                                                                                \
  METAL_FUNC T NAME(T value) {                                                                                         \
    if constexpr (metal_sim::is_word_v<T>)                                                                             \
      return T(WORD);                                                                                                  \
    else                                                                                                               \
      return metal_sim::reduce(value, [](T a, T b) { return T(EXPRESSION); });                                         \
  }
#if __CUDA_ARCH__ >= 800
METAL_SIM_REDUCTION(simd_sum, a + b, __reduce_add_sync(metal_sim::ALL_LANES, value))
METAL_SIM_REDUCTION(simd_min, min(a, b), __reduce_min_sync(metal_sim::ALL_LANES, value))
METAL_SIM_REDUCTION(simd_max, max(a, b), __reduce_max_sync(metal_sim::ALL_LANES, value))
METAL_SIM_REDUCTION(simd_and, a& b, __reduce_and_sync(metal_sim::ALL_LANES, uint32_t(value)))
METAL_SIM_REDUCTION(simd_or, a | b, __reduce_or_sync(metal_sim::ALL_LANES, uint32_t(value)))
METAL_SIM_REDUCTION(simd_xor, a ^ b, __reduce_xor_sync(metal_sim::ALL_LANES, uint32_t(value)))
#else
METAL_SIM_REDUCTION(simd_sum, a + b, metal_sim::reduce(value, [](T a, T b) { return T(a + b); }))
METAL_SIM_REDUCTION(simd_min, min(a, b), metal_sim::reduce(value, [](T a, T b) { return min(a, b); }))
METAL_SIM_REDUCTION(simd_max, max(a, b), metal_sim::reduce(value, [](T a, T b) { return max(a, b); }))
METAL_SIM_REDUCTION(simd_and, a& b, metal_sim::reduce(value, [](T a, T b) { return T(a & b); }))
METAL_SIM_REDUCTION(simd_or, a | b, metal_sim::reduce(value, [](T a, T b) { return T(a | b); }))
METAL_SIM_REDUCTION(simd_xor, a ^ b, metal_sim::reduce(value, [](T a, T b) { return T(a ^ b); }))
#endif
METAL_SIM_REDUCTION(simd_product, a* b, metal_sim::reduce(value, [](T a, T b) { return T(a * b); }))
#undef METAL_SIM_REDUCTION

#define METAL_SIM_SCAN(NAME, START, EXPRESSION)                                                                        \
  template <typename T>                                                                                                \
  METAL_FUNC T simd_prefix_inclusive_##NAME(T value) {                                                                 \
    return metal_sim::scan(value, [](T a, T b) { return T(EXPRESSION); });                                             \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  METAL_FUNC T simd_prefix_exclusive_##NAME(T value) {                                                                 \
    const uint32_t lane = metal_sim::cuda_lane();                                                                      \
    const T before = metal_sim::read_lane(simd_prefix_inclusive_##NAME(value), (lane - 1) % SIMD_WIDTH);               \
    return lane == 0 ? T(START) : before;                                                                              \
  }
METAL_SIM_SCAN(sum, 0, a + b)
METAL_SIM_SCAN(product, 1, a* b)
#undef METAL_SIM_SCAN

template <typename T>
METAL_FUNC T simd_broadcast(T value, ushort lane) {
  return metal_sim::read_lane(value, lane);
}
template <typename T>
METAL_FUNC T simd_shuffle(T value, ushort lane) {
  return metal_sim::read_lane(value, lane);
}
template <typename T>
METAL_FUNC T simd_shuffle_xor(T value, ushort mask) {
  return metal_sim::read_lane(value, metal_sim::cuda_lane() ^ mask);
}
/// Lanes below `delta` keep their own value, as on Apple's GPUs.
template <typename T>
METAL_FUNC T simd_shuffle_up(T value, ushort delta) {
  const uint lane = metal_sim::cuda_lane();
  return metal_sim::read_lane(value, lane < delta ? lane : lane - delta);
}
template <typename T>
METAL_FUNC T simd_shuffle_down(T value, ushort delta) {
  const uint lane = metal_sim::cuda_lane();
  return metal_sim::read_lane(value, lane + delta >= SIMD_WIDTH ? lane : lane + delta);
}
template <typename T>
METAL_FUNC T simd_shuffle_rotate_up(T value, ushort delta) {
  return metal_sim::read_lane(value, (metal_sim::cuda_lane() - delta) % SIMD_WIDTH);
}
template <typename T>
METAL_FUNC T simd_shuffle_rotate_down(T value, ushort delta) {
  return metal_sim::read_lane(value, (metal_sim::cuda_lane() + delta) % SIMD_WIDTH);
}
/// Lanes below `delta` get the last `delta` lanes' fill.
template <typename T>
METAL_FUNC T simd_shuffle_and_fill_up(T value, T fill, ushort delta) {
  const uint lane = metal_sim::cuda_lane();
  const T shifted = metal_sim::read_lane(value, (lane - delta) % SIMD_WIDTH);
  const T filled = metal_sim::read_lane(fill, (lane - delta) % SIMD_WIDTH);
  return lane < delta ? filled : shifted;
}
template <typename T>
METAL_FUNC T simd_shuffle_and_fill_down(T value, T fill, ushort delta) {
  const uint lane = metal_sim::cuda_lane();
  const T shifted = metal_sim::read_lane(value, (lane + delta) % SIMD_WIDTH);
  const T filled = metal_sim::read_lane(fill, (lane + delta) % SIMD_WIDTH);
  return lane + delta >= SIMD_WIDTH ? filled : shifted;
}

METAL_FUNC simd_vote simd_ballot(bool value) { return simd_vote(__ballot_sync(metal_sim::ALL_LANES, value)); }
METAL_FUNC bool simd_all(bool value) { return __all_sync(metal_sim::ALL_LANES, value); }
METAL_FUNC bool simd_any(bool value) { return __any_sync(metal_sim::ALL_LANES, value); }
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_vote(__activemask()); }
METAL_FUNC bool simd_is_first() { return (__activemask() & ((1u << metal_sim::cuda_lane()) - 1)) == 0; }
template <typename T>
METAL_FUNC T simd_broadcast_first(T value) {
  return metal_sim::read_lane(value, uint32_t(__ffs(int(__activemask()))) - 1);
}

} // namespace metal
