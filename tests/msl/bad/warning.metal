// What the compiler warns of is an error.
#include <metal_stdlib>
using namespace metal;

kernel void careless(device int* out [[buffer(0)]], constant uint& count [[buffer(1)]]) {
  int unused = 3; // error: unused variable
  for (int i = 0; i < count; ++i) // error: comparison of integers of different signs
    out[i] = i;
}
