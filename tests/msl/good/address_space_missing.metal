// Every pointer and reference says where it points to.
#include <metal_stdlib>
using namespace metal;

struct Rows {
  device const float* row;
};
using Pointer = device float*;

template <typename T>
inline void fill(device T* to, uint count) {
  for (uint i = 0; i < count; ++i)
    to[i] = T(0);
}
inline float first(thread const float& x, thread const uint& y) { return x + float(y); }
inline thread float& same(thread float& x) { return x; }
inline float sum(thread float (&values)[4]) { return values[0]; }
inline uint word(device const uchar* from) { return *reinterpret_cast<device const uint*>(from); }
kernel void each(device const float* in [[buffer(0)]], device float* out [[buffer(1)]]) {
  device float& x = out[0];
  device float* outside = &x;
  Rows rows = {in};
  fill(outside, 4);
  float values[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  const uint one = 1;
  x = sum(values) + first(values[0], one) + same(values[1]) + rows.row[0];
}
