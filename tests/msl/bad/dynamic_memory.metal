// No new and delete.
#include <metal_stdlib>
using namespace metal;

kernel void allocate(device uint* out [[buffer(0)]]) {
  thread uint* p = new uint; // error: new' is not supported
  out[0] = p[0];
  delete p; // error: delete' is not supported
}
