// Rotations of activations around the products with trellis weights, W = diag(svh) H What H diag(suh):
//
//   rotate_inputs      : out[p, a] = H (suh_p * x[token]) for p = gate, up: their suh differ, and those of each expert
//   rotate_activations : out[a] = H (suh_down * act(svh_gate * H h[gate, a] + bias, svh_up * H h[up, a] + bias))
//   rotate_outputs     : out[token] = sum over slots of weight * (svh_down * H y[a] + bias), in slot order
//
// H is the Hadamard transform of blocks of 128, hadamard.h. Everything between the two rotations of a block needs that
// block alone, so that what follows one product and comes before the next is one kernel. Layouts: see rotate.h.
// A simdgroup takes a block of 128 columns, a lane HADAMARD_LANE_VALUES consecutive ones of it. Values are fp32 from x
// to the last rounding. Assignments without an expert are left out; nothing reads their rows.
//
// Bytes: 4 per element of what is read and written between products: little beside weights.
#include "../tiles/early_start.h"
#include "rotate_block.h"

constexpr constant uint SIMDGROUPS = simdgroups(ROTATE_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint THREADS = SIMDGROUPS * SIMD_WIDTH;
constexpr constant uint VALUES = ROTATE_VALUES;
constexpr constant uint OUTPUT_SIMDGROUPS = simdgroups(ROTATE_OUTPUT_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint OUTPUT_THREADS = OUTPUT_SIMDGROUPS * SIMD_WIDTH;
/// Columns of a block that a thread sums over slots: one, if threads suffice.
constexpr constant uint OUTPUT_COLUMNS = OUTPUT_THREADS < HADAMARD_BLOCK ? HADAMARD_BLOCK / OUTPUT_THREADS : 1;

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void rotate_inputs(device const uchar* x [[buffer(0)]], device const int* ids [[buffer(1)]],
                   device const uchar* gate_scales [[buffer(2)]], device const ExpertMatrix* gate_table [[buffer(3)]],
                   device const uchar* up_scales [[buffer(4)]], device const ExpertMatrix* up_table [[buffer(5)]],
                   device float* out [[buffer(6)]], constant RotateArgs& args [[buffer(7)]],
                   uint3 threadgroup_position [[threadgroup_position_in_grid]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint block = threadgroup_position.x * SIMDGROUPS + simdgroup, assignment = threadgroup_position.y;
  const uint expert = expert_of(ids, assignment, args);
  if (block >= rotate_blocks(args.hidden) || expert == NO_EXPERT)
    return;
  const uint first = block * HADAMARD_BLOCK + lane * VALUES;
  device const half* suh = threadgroup_position.z == 0 ? lane_scales(gate_scales, gate_table[expert].scales, first)
                                                       : lane_scales(up_scales, up_table[expert].scales, first);
  float value[VALUES];
  rotated_input(x, ulong(assignment / args.top_k) * args.x_row_stride, suh, first, lane, args, value);
  const ulong place = ulong(threadgroup_position.z) * args.rows + assignment;
  const uint blocks = rotate_blocks(args.hidden);
  store_rotated(out + place * rotated_stride(blocks), blocks, block, lane, value);
}

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void rotate_activations(device const float* h [[buffer(0)]], device const int* ids [[buffer(1)]],
                        device const uchar* bias [[buffer(2)]], device const uchar* gate_biases [[buffer(3)]],
                        device const ExpertMatrix* gate_table [[buffer(4)]],
                        device const uchar* up_biases [[buffer(5)]], device const ExpertMatrix* up_table [[buffer(6)]],
                        device const uchar* down_scales [[buffer(7)]],
                        device const ExpertMatrix* down_table [[buffer(8)]], device float* out [[buffer(9)]],
                        constant RotateArgs& args [[buffer(10)]],
                        uint2 threadgroup_position [[threadgroup_position_in_grid]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint block = threadgroup_position.x * SIMDGROUPS + simdgroup, assignment = threadgroup_position.y;
  const uint expert = expert_of(ids, assignment, args);
  if (block >= rotate_blocks(args.intermediate) || expert == NO_EXPERT)
    return;
  const uint first = block * HADAMARD_BLOCK + lane * VALUES;
  const ActivationBuffers from{{h, bias, gate_biases, gate_table, up_biases, up_table}, down_scales, down_table};
  ActivationScales scales;
  scales.load(from, expert, first);
  float value[VALUES];
  rotated_activation(from, scales, assignment, expert, first, lane, args, value);
  const uint blocks = rotate_blocks(args.intermediate);
  store_rotated(out + ulong(assignment) * rotated_stride(blocks), blocks, block, lane, value);
}

/// A lane's share of svh of a slot's expert.
struct OutputScales {
  uint expert; // or NO_EXPERT
  float svh[VALUES];

  void load(device const int* ids, device const uchar* biases, device const ExpertMatrix* table, uint token, uint slot,
            uint first, constant RotateArgs& args) thread {
    expert = slot < args.top_k ? early_expert_of(ids, token * args.top_k + slot, args) : NO_EXPERT;
    if (expert != NO_EXPERT)
      load_scales(lane_scales(biases, table[expert].biases, first), svh);
  }
};

[[kernel, max_total_threads_per_threadgroup(OUTPUT_THREADS)]]
void rotate_outputs(device const float* y [[buffer(0)]], device const int* ids [[buffer(1)]],
                    device const uchar* topk_weights [[buffer(2)]], device const uchar* bias [[buffer(3)]],
                    device const uchar* down_biases [[buffer(4)]], device const ExpertMatrix* down_table [[buffer(5)]],
                    device uchar* out [[buffer(6)]], constant RotateArgs& args [[buffer(7)]],
                    threadgroup float* parts [[threadgroup(0)]],
                    uint2 threadgroup_position [[threadgroup_position_in_grid]],
                    uint thread_index [[thread_index_in_threadgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint block = threadgroup_position.x * HADAMARD_BLOCK, token = threadgroup_position.y;
  const uint first = block + lane * VALUES, padded = rotate_padded(args.hidden);
  float total[OUTPUT_COLUMNS];
  UNROLL_SHARE
  for (uint i = 0; i < OUTPUT_COLUMNS; ++i)
    total[i] = 0.0f;
  OutputScales scales;
  scales.load(ids, down_biases, down_table, token, simdgroup, first, args);
  wait_for_previous_kernel();
  // Simdgroups take the next slots at once, one each; then their parts are added in the slots' order.
  for (uint begin = 0; begin < args.top_k; begin += OUTPUT_SIMDGROUPS) {
    const uint slot = begin + simdgroup, assignment = token * args.top_k + slot;
    if (begin > 0)
      scales.load(ids, down_biases, down_table, token, slot, first, args);
    const uint expert = scales.expert;
    float value[1][VALUES];
    UNROLL_SHARE
    for (uint i = 0; i < VALUES; ++i)
      value[0][i] = 0.0f;
    if (expert != NO_EXPERT) {
      load_values<1>(y + ulong(assignment) * padded + first, 0, args.slices, ulong(args.rows) * padded, value);
      const float weight =
          load_scalar(topk_weights, ulong(token) * args.weights_token_stride + ulong(slot) * args.weights_slot_stride,
                      args.weights_type);
      rotate(value[0], lane);
      UNROLL_SHARE
      for (uint i = 0; i < VALUES; ++i)
        value[0][i] *= scales.svh[i];
      if (args.has_bias2)
        for (uint i = 0; i < VALUES && first + i < args.hidden; ++i)
          value[0][i] += load_scalar(bias, ulong(expert) * args.hidden + first + i, args.type);
      UNROLL_SHARE
      for (uint i = 0; i < VALUES; ++i)
        value[0][i] *= weight;
    }
    UNROLL_SHARE
    for (uint i = 0; i < VALUES; ++i)
      parts[simdgroup * HADAMARD_BLOCK + lane * VALUES + i] = value[0][i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < HADAMARD_BLOCK) {
      for (uint s = 0; s < OUTPUT_SIMDGROUPS; ++s) {
        UNROLL_SHARE
        for (uint i = 0; i < OUTPUT_COLUMNS; ++i)
          total[i] += parts[s * HADAMARD_BLOCK + thread_index * OUTPUT_COLUMNS + i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (thread_index < HADAMARD_BLOCK) {
    const uint column = block + thread_index * OUTPUT_COLUMNS;
    for (uint i = 0; i < OUTPUT_COLUMNS && column + i < args.hidden; ++i)
      store_scalar(out, ulong(token) * args.hidden + column + i, args.type, total[i]);
  }
}
