// A pointer into one address space is no pointer into another.
#include <metal_stdlib>
using namespace metal;

inline float first(device const float* p) { return p[0]; }
struct Counter {
  uint n;
  void add() { ++n; }
};
kernel void match(device float* out [[buffer(0)]], device const uint* words [[buffer(1)]],
                  constant float* table [[buffer(2)]], device Counter* counters [[buffer(3)]],
                  threadgroup float* shared [[threadgroup(0)]]) {
  float sum = first(out);
  threadgroup float* p = shared;
  p[0] = out[0];
  device const float* floats = reinterpret_cast<device const float*>(words);
  constant float* q = table;
  Counter counter = counters[0];
  counter.add();
  counters[0] = counter;
  p[0] = sum + floats[0] + q[0];
}
