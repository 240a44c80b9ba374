// Nothing becomes bfloat by itself, and no simdgroup function takes it.
#include <metal_stdlib>
using namespace metal;

kernel void narrow(device bfloat* out [[buffer(0)]], device const half* halves [[buffer(1)]]) {
  bfloat x = bfloat(0.5f), y = 0.5bf;
  out[0] = bfloat(x * 2.0f);
  out[1] = bfloat(out[1] + 1.0f) + y;
  out[2] = bfloat(abs(x));
  out[3] = bfloat(float(halves[0]));
  out[4] = bfloat(simd_sum(float(x)));
  const float sum = x;
  out[5] = bfloat(simd_shuffle_xor(sum, 1));
  out[6] += 2 * x;
}
