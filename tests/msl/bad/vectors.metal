// A vector has as many elements as its type says.
#include <metal_stdlib>
using namespace metal;

template <typename T>
inline void store(device T* to, float a, float b) {
  *reinterpret_cast<device vec<T, 2>*>(to) = vec<T, 2>(T(a), T(b), T(a)); // error: one value per element
}
kernel void make(device half* out [[buffer(0)]], device float4* wide [[buffer(1)]]) {
  store(out, 1.0f, 2.0f);
  wide[0] = float4(1.0f, 2.0f, 3.0f); // error: one value per element
}
