// The width of a simdgroup is SIMD_WIDTH.
#include <metal_stdlib>
using namespace metal;

kernel void strided(device uint* out [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
  for (uint i = lane; i < 64; i += SIMD_WIDTH)
    out[i] = i;
  const ulong both = ulong(out[0]) << 32; // 32: bits of a word
  out[1] = uint(both) + 132 + uint(3.32f);
}
