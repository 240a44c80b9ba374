// Threadgroup memory is an argument, of a size that the host gives; variables of 32 KiB and more fit no GPU.
#include <metal_stdlib>
using namespace metal;

kernel void share(device float* out [[buffer(0)]], threadgroup float* rows [[threadgroup(0)]],
                  threadgroup float4* columns [[threadgroup(1)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float* row = rows + 64 * i;
  out[i] = row[0] + columns[i].x;
}
