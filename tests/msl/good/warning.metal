// What the compiler warns of is an error.
#include <metal_stdlib>
using namespace metal;

kernel void careful(device int* out [[buffer(0)]], constant uint& count [[buffer(1)]]) {
  for (uint i = 0; i < count; ++i)
    out[i] = int(i);
}
