// Nothing becomes bfloat by itself, and no simdgroup function takes it.
#include <metal_stdlib>
using namespace metal;

kernel void narrow(device bfloat* out [[buffer(0)]], device const half* halves [[buffer(1)]]) {
  bfloat x = 0.5f; // error: bfloat
  out[0] = x * 2.0f; // error: bfloat
  out[1] += 1.0f; // error: bfloat
  out[2] = abs(x); // error: bfloat
  out[3] = halves[0]; // error: bfloat
  out[4] = simd_sum(x); // error: deleted function 'simd_sum'
  const float y = simd_shuffle_xor(x, 1); // error: deleted function 'simd_shuffle_xor'
  out[5] = bfloat(y);
}
