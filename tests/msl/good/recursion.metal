// No function reaches itself.
#include <metal_stdlib>
using namespace metal;

inline uint factorial(uint n) {
  uint product = 1;
  for (uint i = 2; i <= n; ++i)
    product *= i;
  return product;
}
/// One instance calls another, not itself.
template <uint N>
struct Depth {
  static uint of() { return 1 + Depth<N - 1>::of(); }
};
template <>
struct Depth<0> {
  static uint of() { return 0; }
};
inline uint twice(uint x) { return x + x; }
inline float twice(float x) { return float(twice(uint(x))); } // another function of the same name
kernel void not_recursive(device uint* out [[buffer(0)]]) {
  out[0] = factorial(5) + Depth<4>::of() + uint(twice(2.0f)) + twice(3u);
}
