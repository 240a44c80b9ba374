// No goto.
#include <metal_stdlib>
using namespace metal;

kernel void jump(device uint* out [[buffer(0)]]) {
  uint i = 0;
again:
  out[i] = i;
  if (++i < 4)
    goto again; // error: goto is not supported
}
