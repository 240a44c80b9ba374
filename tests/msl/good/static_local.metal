// No variable outlives the call, and none belongs to a thread of the host.
#include <metal_stdlib>
using namespace metal;

kernel void count(device uint* out [[buffer(0)]]) {
  uint calls = 0;
  constexpr uint STEP = 2;
  out[0] = calls + STEP;
}
