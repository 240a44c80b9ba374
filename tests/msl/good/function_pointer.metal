// No pointers or references to functions.
#include <metal_stdlib>
using namespace metal;

struct Twice {
  static float of(float x) { return x + x; }
};
template <typename F>
inline float apply_to(float x) {
  return F::of(x);
}
kernel void apply(device float* out [[buffer(0)]]) { out[0] = apply_to<Twice>(1.0f); }
