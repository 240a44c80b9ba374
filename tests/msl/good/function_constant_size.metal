// The value of a function constant is known when a pipeline is made, too late for types.
#include <metal_stdlib>
using namespace metal;

constant uint COUNT [[function_constant(0)]];

template <uint N>
inline uint sum(thread const uint* values) {
  uint total = 0;
  for (uint i = 0; i < N; ++i)
    total += values[i];
  return total;
}

kernel void sums(device uint* out [[buffer(0)]]) {
  uint values[4] = {1, 2, 3, 4};
  out[0] = COUNT == 2 ? sum<2>(values) : sum<4>(values);
  uint more[4];
  for (uint i = 0; i < COUNT; ++i)
    more[i] = i;
  out[1] = more[0];
}
