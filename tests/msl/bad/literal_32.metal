// The width of a simdgroup is SIMD_WIDTH.
#include <metal_stdlib>
using namespace metal;

kernel void strided(device uint* out [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
  for (uint i = lane; i < 64; i += 32) // error: a literal
    out[i] = i;
  out[lane / 0x20u] = 0; // error: a literal
}
