// Threadgroup memory is an argument, of a size that the host gives; variables of 32 KiB and more fit no GPU.
#include <metal_stdlib>
using namespace metal;

kernel void share(device float* out [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float rows[64][64]; // error: threadgroup variable inside a function
  threadgroup float4 columns[1025]; // error: threadgroup variables of 32784 bytes
  out[i] = float(i);
}
