// There is no double, and nothing longer than long.
#include <metal_stdlib>
using namespace metal;

inline float half_of(float x) { return x / 2.0; } // a number without suffix is a float
kernel void numbers(device float* out [[buffer(0)]], device float* sums [[buffer(1)]]) {
  long wide = 1l;
  out[0] = float(wide) + half_of(sums[0]);
}
