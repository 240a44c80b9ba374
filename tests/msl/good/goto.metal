// No goto.
#include <metal_stdlib>
using namespace metal;

kernel void jump(device uint* out [[buffer(0)]]) {
  for (uint i = 0; i < 4; ++i)
    out[i] = i;
}
