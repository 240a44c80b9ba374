// No two arguments of a kernel have one place in a table.
#include <metal_stdlib>
using namespace metal;

kernel void once(device uint* a [[buffer(0)]], device uint* b [[buffer(1)]], constant uint& c [[buffer(2)]],
                 threadgroup uint* d [[threadgroup(0)]], threadgroup uint* e [[threadgroup(1)]]) {
  a[0] = b[0] + c + d[0] + e[0];
}
