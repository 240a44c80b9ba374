// Simdgroup functions: each lane writes what it got, one row of SIMD_WIDTH values per function.
#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;

template <typename T>
[[kernel]] void simdgroup_functions(device const T* in [[buffer(0)]], device T* out [[buffer(1)]],
                                    uint lane [[thread_index_in_simdgroup]]) {
  const T x = in[lane];
  const ushort next = ushort((lane + 1) % SIMD_WIDTH);
  uint row = 0;
  out[SIMD_WIDTH * row++ + lane] = simd_sum(x);
  out[SIMD_WIDTH * row++ + lane] = simd_max(x);
  out[SIMD_WIDTH * row++ + lane] = simd_min(x);
  out[SIMD_WIDTH * row++ + lane] = simd_prefix_inclusive_sum(x);
  out[SIMD_WIDTH * row++ + lane] = simd_prefix_exclusive_sum(x);
  out[SIMD_WIDTH * row++ + lane] = simd_broadcast(x, SIMD_WIDTH - 1);
  out[SIMD_WIDTH * row++ + lane] = simd_broadcast_first(x);
  out[SIMD_WIDTH * row++ + lane] = simd_shuffle(x, next);
  out[SIMD_WIDTH * row++ + lane] = simd_shuffle_xor(x, SIMD_WIDTH / 2);
  out[SIMD_WIDTH * row++ + lane] = simd_shuffle_up(x, 1);
  out[SIMD_WIDTH * row++ + lane] = simd_shuffle_down(x, 1);
  out[SIMD_WIDTH * row++ + lane] = simd_shuffle_and_fill_down(x, T(99), 1);
  out[SIMD_WIDTH * row++ + lane] = simd_shuffle_and_fill_up(x, T(99), 1);
  out[SIMD_WIDTH * row++ + lane] = simd_shuffle_rotate_down(x, 1);
}

#define FUNCTIONS(name, T)                                                                                             \
  template                                                                                                             \
      [[host_name("simdgroup_functions_" #name)]] [[kernel]] decltype(simdgroup_functions<T>) simdgroup_functions<T>;
FUNCTIONS(fp32, float)
FUNCTIONS(fp16, half)
FUNCTIONS(int32, int)

/// Votes, on lanes that have at least one set bit of `in`. Threads beyond the first `live` leave before.
kernel void votes(device const uint* in [[buffer(0)]], device ulong* out [[buffer(1)]],
                  constant uint& live [[buffer(2)]], uint lane [[thread_index_in_simdgroup]]) {
  if (lane >= live)
    return;
  const bool set = in[lane] != 0;
  device ulong* to = out + 8 * lane;
  to[0] = ulong(simd_vote::vote_t(simd_ballot(set)));
  to[1] = simd_any(set) ? 1 : 0;
  to[2] = simd_all(set) ? 1 : 0;
  to[3] = simd_is_first() ? 1 : 0;
  to[4] = ulong(simd_vote::vote_t(simd_active_threads_mask()));
  to[5] = simd_sum(1u);
  to[6] = simd_or(in[lane]);
  to[7] = simd_sum(uint2(1u, lane)).y;
}
