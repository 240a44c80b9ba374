// A member function works on an object in thread memory.
#include <metal_stdlib>
using namespace metal;

struct Counter {
  uint n;
  void add() { ++n; }
};
kernel void count(device Counter* counters [[buffer(0)]]) {
  counters[0].add(); // error: address space|cannot initialize object parameter|'this'
}
