// What the kernels around products with trellis weights do to a block of 128 columns: a simdgroup takes a block, a lane
// HADAMARD_LANE_VALUES consecutive columns of it, the first of which is `first`. Values are fp32 from x to the last
// rounding.
#pragma once
#include "../formats/expert_matrix.h"
#include "activation.h"
#include "rotate.h"

constexpr constant uint ROTATE_VALUES = HADAMARD_LANE_VALUES;

/// The expert of an assignment, or NO_EXPERT.
inline uint expert_of(device const int* ids, uint assignment, constant RotateArgs& args) {
  const ulong token = assignment / args.top_k, slot = assignment % args.top_k;
  return load_id(ids, token * args.ids_token_stride + slot * args.ids_slot_stride, args.id_words, args.experts);
}

/// A lane's share of a vector of fp16 scales that begins `offset` bytes into a buffer.
inline device const half* lane_scales(device const uchar* buffer, ulong offset, uint first) {
  return reinterpret_cast<device const half*>(buffer + offset) + first;
}

/// value = H value.
inline void rotate(thread float (&value)[ROTATE_VALUES], uint lane) {
  hadamard_sums(value, lane);
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i)
    value[i] *= HADAMARD_NORM;
}

/// A lane's share of fp16 scales, as fp32: asked for before they are needed.
inline void load_scales(device const half* from, thread float (&scale)[ROTATE_VALUES]) {
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i)
    scale[i] = float(from[i]);
}

/// For each of N blocks the sum of its slices, in their order: slice s of block n begins n * step + s * stride elements
/// further on.
template <uint N>
inline void load_values(device const float* from, ulong step, uint slices, ulong stride,
                        thread float (&value)[N][ROTATE_VALUES]) {
#if SIMD_WIDTH == 1
  for (uint n = 0; n < N; ++n) {
    for (uint i = 0; i < ROTATE_VALUES; ++i)
      value[n][i] = from[n * step + i];
    for (uint s = 1; s < slices; ++s)
      for (uint i = 0; i < ROTATE_VALUES; ++i)
        value[n][i] += from[n * step + s * stride + i];
  }
#else
  // Several slices at once: each would otherwise wait for memory after the one before it.
  constexpr uint TOGETHER = 4;
  float4 sum[N];
  UNROLL
  for (uint n = 0; n < N; ++n)
    sum[n] = float4(0.0f);
  for (uint begin = 0; begin < slices; begin += TOGETHER) {
    float4 part[N][TOGETHER];
    UNROLL
    for (uint s = 0; s < TOGETHER; ++s) {
      UNROLL
      for (uint n = 0; n < N; ++n)
        part[n][s] = begin + s < slices
                         ? *reinterpret_cast<device const float4*>(from + n * step + (begin + s) * stride)
                         : float4(0.0f);
    }
    UNROLL
    for (uint s = 0; s < TOGETHER; ++s) {
      UNROLL
      for (uint n = 0; n < N; ++n)
        sum[n] += part[n][s];
    }
  }
  UNROLL
  for (uint n = 0; n < N; ++n) {
    UNROLL
    for (uint i = 0; i < ROTATE_VALUES; ++i)
      value[n][i] = sum[n][i];
  }
#endif
}

/// A lane's share of a rotated block.
inline void store_values(device float* to, thread const float (&value)[ROTATE_VALUES]) {
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i)
    to[i] = value[i];
}

/// H (suh * x) of a row of `columns` columns of a ScalarType that begins at element `row` of x; suh: this lane's.
inline void rotated_row(device const uchar* x, ulong row, uint columns, uint type, device const half* suh, uint first,
                        uint lane, thread float (&value)[ROTATE_VALUES]) {
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i)
    value[i] = first + i < columns ? load_scalar(x, row + first + i, type) * float(suh[i]) : 0.0f;
  rotate(value, lane);
}

/// The same of a row of hidden states.
inline void rotated_input(device const uchar* x, ulong row, device const half* suh, uint first, uint lane,
                          constant RotateArgs& args, thread float (&value)[ROTATE_VALUES]) {
  rotated_row(x, row, args.hidden, args.type, suh, first, lane, value);
}

/// What becomes of the sums of gate and up; see rotate.h.
struct GateUpBuffers {
  device const float* h;
  device const uchar* bias;
  device const uchar* gate_biases;
  device const ExpertMatrix* gate_table;
  device const uchar* up_biases;
  device const ExpertMatrix* up_table;
};

/// act(svh_gate * H h[gate] + bias, svh_up * H h[up] + bias) of an assignment; beyond I whatever the function makes of
/// what stands there.
inline void unrotated_activation(thread const GateUpBuffers& from, uint assignment, uint expert, uint first, uint lane,
                                 constant RotateArgs& args, thread float (&value)[ROTATE_VALUES]) {
  const uint padded = rotate_padded(args.intermediate);
  const ulong matrix = ulong(args.rows) * padded, slice = args.gated ? 2 * matrix : matrix;
  device const float* h = from.h + ulong(assignment) * padded + first;
  float both[2][ROTATE_VALUES], svh[2][ROTATE_VALUES];
  // Without a gate both are the same: what the function makes of the second is not looked at.
  load_values<2>(h, args.gated ? matrix : 0, args.slices, slice, both);
  load_scales(lane_scales(from.gate_biases, from.gate_table[expert].biases, first), svh[0]);
  load_scales(lane_scales(from.up_biases, from.up_table[expert].biases, first), svh[1]);
  rotate(both[0], lane);
  rotate(both[1], lane);
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i) {
    both[0][i] *= svh[0][i];
    both[1][i] *= svh[1][i];
  }
  if (args.has_bias1) {
    const uint I = args.intermediate;
    const ulong begin = ulong(expert) * (args.gated ? 2 * I : I);
    for (uint i = 0; i < ROTATE_VALUES && first + i < I; ++i) {
      const uint n = first + i;
      both[0][i] += load_scalar(from.bias, begin + n, args.type);
      if (args.gated)
        both[1][i] += load_scalar(from.bias, begin + I + n, args.type);
    }
  }
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i)
    value[i] = activate(args.activation, both[0][i], both[1][i], args.alpha, args.limit);
}

/// What the rotation of activations reads; see rotate.h.
struct ActivationBuffers {
  GateUpBuffers gate_up;
  device const uchar* down_scales;
  device const ExpertMatrix* down_table;
};

/// H (suh_down * act(svh_gate * H h[gate] + bias, svh_up * H h[up] + bias)) of an assignment.
inline void rotated_activation(thread const ActivationBuffers& from, uint assignment, uint expert, uint first,
                               uint lane, constant RotateArgs& args, thread float (&value)[ROTATE_VALUES]) {
  float suh[ROTATE_VALUES];
  load_scales(lane_scales(from.down_scales, from.down_table[expert].scales, first), suh);
  unrotated_activation(from.gate_up, assignment, expert, first, lane, args, value);
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i) // columns beyond I: there are no weights for them
    value[i] = first + i < args.intermediate ? value[i] * suh[i] : 0.0f;
  rotate(value, lane);
}
