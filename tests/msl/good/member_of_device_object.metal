// A member function works on an object in thread memory.
#include <metal_stdlib>
using namespace metal;

struct Counter {
  uint n;
  void add() { ++n; }
};
kernel void count(device Counter* counters [[buffer(0)]]) {
  Counter counter = counters[0];
  counter.add();
  counters[0] = counter;
}
