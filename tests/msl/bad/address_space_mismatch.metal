// A pointer into one address space is no pointer into another.
#include <metal_stdlib>
using namespace metal;

inline float first(thread const float* p) { return p[0]; }
kernel void mismatch(device float* out [[buffer(0)]], device const uint* words [[buffer(1)]],
                     constant float* table [[buffer(2)]], threadgroup float* shared [[threadgroup(0)]]) {
  float sum = first(out);            // error: (?s)no matching function.*address space
  threadgroup float* p = shared;
  p = out;                           // error: address space|incompatible
  device const float* floats = words; // error: cannot initialize
  device float* q = table;           // error: cannot initialize
  table[0] = 1.0f;                   // error: read-only|not assignable|const
  p[0] = sum + floats[0] + q[0];
}
