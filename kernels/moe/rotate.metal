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
#include "../formats/expert_matrix.h"
#include "activation.h"
#include "rotate.h"

constexpr constant uint SIMDGROUPS = simdgroups(ROTATE_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint THREADS = SIMDGROUPS * SIMD_WIDTH;
constexpr constant uint VALUES = HADAMARD_LANE_VALUES;

/// The expert of an assignment, or NO_EXPERT.
inline uint expert_of(device const int* ids, uint assignment, constant RotateArgs& args) {
  const ulong token = assignment / args.top_k, slot = assignment % args.top_k;
  return load_id(ids, token * args.ids_token_stride + slot * args.ids_slot_stride, args.id_words, args.experts);
}

/// A lane's share of a vector of fp16 scales that begins `offset` bytes into a buffer.
inline device const half* lane_scales(device const uchar* buffer, ulong offset, uint column) {
  return reinterpret_cast<device const half*>(buffer + offset) + column;
}

/// value = H value.
inline void rotate(thread float (&value)[VALUES], uint lane) {
  hadamard_sums(value, lane);
  UNROLL
  for (uint i = 0; i < VALUES; ++i)
    value[i] *= HADAMARD_NORM;
}

inline void load_values(device const float* from, thread float (&value)[VALUES]) {
  UNROLL
  for (uint i = 0; i < VALUES; ++i)
    value[i] = from[i];
}

inline void store_values(device float* to, thread const float (&value)[VALUES]) {
  UNROLL
  for (uint i = 0; i < VALUES; ++i)
    to[i] = value[i];
}

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
  const ulong row = ulong(assignment / args.top_k) * args.x_row_stride;
  float value[VALUES];
  UNROLL
  for (uint i = 0; i < VALUES; ++i)
    value[i] = first + i < args.hidden ? load_scalar(x, row + first + i, args.type) * float(suh[i]) : 0.0f;
  rotate(value, lane);
  const ulong place = ulong(threadgroup_position.z) * args.rows + assignment;
  store_values(out + place * rotate_padded(args.hidden) + first, value);
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
  const uint padded = rotate_padded(args.intermediate);
  device const half* suh = lane_scales(down_scales, down_table[expert].scales, first);

  float gate[VALUES], up[VALUES];
  load_values(h + ulong(assignment) * padded + first, gate);
  rotate(gate, lane);
  device const half* gate_svh = lane_scales(gate_biases, gate_table[expert].biases, first);
  UNROLL
  for (uint i = 0; i < VALUES; ++i) {
    gate[i] *= float(gate_svh[i]);
    up[i] = 0.0f;
  }
  if (args.gated) {
    load_values(h + (ulong(args.rows) + assignment) * padded + first, up);
    rotate(up, lane);
    device const half* up_svh = lane_scales(up_biases, up_table[expert].biases, first);
    UNROLL
    for (uint i = 0; i < VALUES; ++i)
      up[i] *= float(up_svh[i]);
  }
  if (args.has_bias1) {
    const uint I = args.intermediate;
    const ulong begin = ulong(expert) * (args.gated ? 2 * I : I);
    for (uint i = 0; i < VALUES && first + i < I; ++i) {
      const uint n = first + i;
      gate[i] += load_scalar(bias, begin + n, args.type);
      if (args.gated)
        up[i] += load_scalar(bias, begin + I + n, args.type);
    }
  }
  UNROLL
  for (uint i = 0; i < VALUES; ++i) {
    const float value = activate(args.activation, gate[i], up[i], args.alpha, args.limit);
    // Columns beyond I: whatever the function makes of them, weights there are none.
    gate[i] = first + i < args.intermediate ? value * float(suh[i]) : 0.0f;
  }
  rotate(gate, lane);
  store_values(out + ulong(assignment) * padded + first, gate);
}

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void rotate_outputs(device const float* y [[buffer(0)]], device const int* ids [[buffer(1)]],
                    device const uchar* topk_weights [[buffer(2)]], device const uchar* bias [[buffer(3)]],
                    device const uchar* down_biases [[buffer(4)]], device const ExpertMatrix* down_table [[buffer(5)]],
                    device uchar* out [[buffer(6)]], constant RotateArgs& args [[buffer(7)]],
                    uint2 threadgroup_position [[threadgroup_position_in_grid]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint block = threadgroup_position.x * SIMDGROUPS + simdgroup, token = threadgroup_position.y;
  if (block >= rotate_blocks(args.hidden))
    return;
  const uint first = block * HADAMARD_BLOCK + lane * VALUES;
  float total[VALUES];
  UNROLL
  for (uint i = 0; i < VALUES; ++i)
    total[i] = 0.0f;
  for (uint slot = 0; slot < args.top_k; ++slot) {
    const uint assignment = token * args.top_k + slot;
    const uint expert = expert_of(ids, assignment, args);
    if (expert == NO_EXPERT)
      continue;
    const float weight =
        load_scalar(topk_weights, ulong(token) * args.weights_token_stride + ulong(slot) * args.weights_slot_stride,
                    args.weights_type);
    device const half* svh = lane_scales(down_biases, down_table[expert].biases, first);
    float value[VALUES];
    load_values(y + ulong(assignment) * rotate_padded(args.hidden) + first, value);
    rotate(value, lane);
    UNROLL
    for (uint i = 0; i < VALUES; ++i)
      value[i] *= float(svh[i]);
    if (args.has_bias2)
      for (uint i = 0; i < VALUES && first + i < args.hidden; ++i)
        value[i] += load_scalar(bias, ulong(expert) * args.hidden + first + i, args.type);
    UNROLL
    for (uint i = 0; i < VALUES; ++i)
      total[i] += weight * value[i];
  }
  for (uint i = 0; i < VALUES && first + i < args.hidden; ++i)
    store_scalar(out, ulong(token) * args.hidden + first + i, args.type, total[i]);
}
