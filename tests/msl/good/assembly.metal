// No inline assembly.
#include <metal_stdlib>
using namespace metal;

kernel void nothing(device uint* out [[buffer(0)]]) { out[0] = 0; }
