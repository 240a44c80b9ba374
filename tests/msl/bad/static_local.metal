// No variable outlives the call, and none belongs to a thread of the host.
#include <metal_stdlib>
using namespace metal;

kernel void count(device uint* out [[buffer(0)]]) {
  static uint calls = 0; // error: static local variable
  thread_local uint own = 0; // error: thread_local
  out[0] = ++calls + ++own;
}
