// Inputs of a kernel have the types that Metal's specification gives them.
#include <metal_stdlib>
using namespace metal;

kernel void inputs(device uint* out [[buffer(0)]], uint2 position [[thread_position_in_grid]],
                   uint2 size [[threads_per_grid]], uint2 group [[threadgroup_position_in_grid]],
                   ushort lane [[thread_index_in_simdgroup]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
                   ushort2 in_group [[thread_position_in_threadgroup]], ushort index [[thread_index_in_threadgroup]],
                   ushort width [[threads_per_simdgroup]]) {
  out[0] = position.x + size.x + group.x + lane + simdgroup + in_group.x + index + width;
}
