// No inline assembly.
#include <metal_stdlib>
using namespace metal;

kernel void nothing(device uint* out [[buffer(0)]]) {
  asm volatile("nop"); // error: inline assembly
  out[0] = 0;
}
