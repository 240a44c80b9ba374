// No new and delete.
#include <metal_stdlib>
using namespace metal;

kernel void allocate(device uint* out [[buffer(0)]]) {
  uint x = 0;
  thread uint* p = &x;
  out[0] = p[0];
}
