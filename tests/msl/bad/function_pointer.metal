// No pointers or references to functions.
#include <metal_stdlib>
using namespace metal;

inline float twice(float x) { return x + x; }
kernel void apply(device float* out [[buffer(0)]]) {
  float (*f)(float) = twice; // error: (pointers to functions|taking address)
  auto g = &twice; // error: taking address of function
  out[0] = f(1.0f) + g(1.0f);
}
