// Between two products of which one alone has trellis weights:
//
//   unrotate_activations: h[row] = act(svh_gate * H sums[gate, a] + bias, svh_up * H sums[up, a] + bias), after which
//                         down has other weights
//   rotate_intermediate : out[a] = H (suh_down * h[row]), before which gate and up had other ones
//
// with row = the assignment a, or its place among sorted rows. Layouts: see rotate_between.h. As in rotate.metal a
// simdgroup takes a block of 128 columns, and assignments without an expert are left out.
//
// Bytes: 4 per element of the sums, those of the type per element of h: little beside weights.
#include "rotate_between.h"
#include "rotate_block.h"

constexpr constant uint SIMDGROUPS = simdgroups(ROTATE_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint THREADS = SIMDGROUPS * SIMD_WIDTH;
constexpr constant uint VALUES = ROTATE_VALUES;

/// Where a row of h begins, in elements.
inline ulong h_row(device const uint* inverse, uint assignment, constant RotateBetweenArgs& args) {
  return ulong(args.sorted ? inverse[assignment] : assignment) * args.h_row_stride;
}

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void unrotate_activations(device const float* sums [[buffer(0)]], device const int* ids [[buffer(1)]],
                          device const uchar* bias [[buffer(2)]], device const uchar* gate_biases [[buffer(3)]],
                          device const ExpertMatrix* gate_table [[buffer(4)]],
                          device const uchar* up_biases [[buffer(5)]],
                          device const ExpertMatrix* up_table [[buffer(6)]], device const uint* inverse [[buffer(7)]],
                          device uchar* h [[buffer(8)]], constant RotateBetweenArgs& args [[buffer(9)]],
                          uint2 threadgroup_position [[threadgroup_position_in_grid]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint block = threadgroup_position.x * SIMDGROUPS + simdgroup, assignment = threadgroup_position.y;
  const uint expert = expert_of(ids, assignment, args.rotate);
  if (block >= rotate_blocks(args.rotate.intermediate) || expert == NO_EXPERT)
    return;
  const uint first = block * HADAMARD_BLOCK + lane * VALUES;
  const GateUpBuffers from{sums, bias, gate_biases, gate_table, up_biases, up_table};
  GateUpScales scales;
  scales.load(from, expert, first);
  float value[VALUES];
  unrotated_activation(from, scales, assignment, expert, first, lane, args.rotate, value);
  const ulong row = h_row(inverse, assignment, args);
  for (uint i = 0; i < VALUES && first + i < args.rotate.intermediate; ++i)
    store_scalar(h, row + first + i, args.rotate.type, value[i]);
}

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void rotate_intermediate(device const uchar* h [[buffer(0)]], device const int* ids [[buffer(1)]],
                         device const uchar* down_scales [[buffer(2)]],
                         device const ExpertMatrix* down_table [[buffer(3)]], device const uint* inverse [[buffer(4)]],
                         device float* out [[buffer(5)]], constant RotateBetweenArgs& args [[buffer(6)]],
                         uint2 threadgroup_position [[threadgroup_position_in_grid]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint block = threadgroup_position.x * SIMDGROUPS + simdgroup, assignment = threadgroup_position.y;
  const uint expert = expert_of(ids, assignment, args.rotate), columns = args.rotate.intermediate;
  if (block >= rotate_blocks(columns) || expert == NO_EXPERT)
    return;
  const uint first = block * HADAMARD_BLOCK + lane * VALUES;
  device const half* suh = lane_scales(down_scales, down_table[expert].scales, first);
  float value[VALUES];
  rotated_row(h, h_row(inverse, assignment, args), columns, args.rotate.type, suh, first, lane, value);
  const uint blocks = rotate_blocks(columns);
  store_rotated(out + ulong(assignment) * rotated_stride(blocks), blocks, block, lane, value);
}
