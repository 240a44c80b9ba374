// No two arguments of a kernel have one place in a table.
#include <metal_stdlib>
using namespace metal;

kernel void twice(device uint* a [[buffer(0)]], device uint* b [[buffer(1)]],
                  constant uint& c [[buffer(1)]], // error: buffer\(1\) is both 'b' and 'c'
                  threadgroup uint* d [[threadgroup(0)]],
                  threadgroup uint* e [[threadgroup(0)]]) { // error: threadgroup\(0\) is both 'd' and 'e'
  a[0] = b[0] + c + d[0] + e[0];
}
