// Inputs of a kernel have the types that Metal's specification gives them.
#include <metal_stdlib>
using namespace metal;

kernel void inputs(device uint* out [[buffer(0)]], uint2 position [[thread_position_in_grid]],
                   uint size [[threads_per_grid]], // error: must have one type, and 'position' is uint2, 'size' is uint
                   uint3 group [[threadgroup_position_in_grid]], // error: same number of components
                   ushort lane [[thread_index_in_simdgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]], // error: 'lane' is ushort, 'simdgroup' is uint
                   uint2 in_group [[thread_position_in_threadgroup]],
                   ushort index [[thread_index_in_threadgroup]], // error: 'index' must be uint
                   float width [[threads_per_simdgroup]]) { // error: is float
  out[0] = position.x + size + group.x + lane + simdgroup + in_group.x + index + uint(width);
}
kernel void aliases(device uint* out [[buffer(0)]], uint a [[threads_per_simdgroup]],
                    uint b [[thread_execution_width]]) { // error: threads_per_simdgroup
  out[0] = a + b;
}
