// There is no double, and nothing longer than long.
#include <metal_stdlib>
using namespace metal;

inline double half_of(float x) { return x / 2; } // error: 'double'
kernel void numbers(device float* out [[buffer(0)]], device double* sums [[buffer(1)]]) { // error: 'double'
  long long wide = 1; // error: 'long long'
  out[0] = float(wide);
}
