// Every pointer and reference says where it points to.
#include <metal_stdlib>
using namespace metal;

struct Rows {
  const float* row; // error: without an address space: 'const float \*'
};
using Pointer = float*; // error: without an address space

template <typename T>
inline void fill(T* to, uint count) { // error: without an address space: 'T \*'
  for (uint i = 0; i < count; ++i)
    to[i] = T(0);
}
inline float first(thread const float& x, const uint& y) { return x + float(y); } // error: without an address space
inline float& same(thread float& x) { return x; } // error: without an address space is returned
inline float sum(float (&values)[4]) { return values[0]; } // error: without an address space
inline uint word(device const uchar* from) {
  return *reinterpret_cast<const uint*>(from); // error: without an address space
}
kernel void none(device float* out [[buffer(0)]]) {
  float* inside = out; // error: cannot initialize|without an address space
  inside[0] = 1.0f;
}
