// No lambdas: Metal has them from 3.2 on, and 3.1 is what is built for.
#include <metal_stdlib>
using namespace metal;

kernel void each(device uint* out [[buffer(0)]]) {
  uint offset = 2;
  auto shifted = [offset](uint i) { return i + offset; }; // error: lambda
  out[0] = shifted(1);
}
