// What the kernels around products with trellis weights do to a block of 128 columns: a simdgroup takes a block, a lane
// HADAMARD_LANE_VALUES consecutive columns of it, the first of which is `first`. Values are fp32 from x to the last
// rounding.
#pragma once
#include "../formats/expert_matrix.h"
#include "activation.h"
#include "rotate.h"
#include "rotated_row.h"

constexpr constant uint ROTATE_VALUES = HADAMARD_LANE_VALUES;

/// The expert of an assignment, or NO_EXPERT.
inline uint expert_of(device const int* ids, uint assignment, constant RotateArgs& args) {
  const ulong token = assignment / args.top_k, slot = assignment % args.top_k;
  return load_id(ids, token * args.ids_token_stride + slot * args.ids_slot_stride, args.id_words, args.experts);
}

/// The same ahead of wait_for_previous_kernel(): past the caches of a core, which may hold older ids.
inline uint early_expert_of(device const int* ids, uint assignment, constant RotateArgs& args) {
#ifdef METAL_SIM_CUDA
  const ulong token = assignment / args.top_k, slot = assignment % args.top_k;
  ids += (token * args.ids_token_stride + slot * args.ids_slot_stride) * args.id_words;
  int words[2] = {metal_sim::cuda_load_fresh(ids), 0};
  if (args.id_words == 2)
    words[1] = metal_sim::cuda_load_fresh(ids + 1);
  return load_id(words, 0, args.id_words, args.experts);
#else
  return expert_of(ids, assignment, args);
#endif
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
  constexpr uint TOGETHER = 8 / N;
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

/// A lane's share of a row that begins at `from`, `count` columns of it from there on; then zeros.
template <typename T>
inline void load_share(device const T* from, uint count, thread float (&value)[ROTATE_VALUES]) {
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i)
    value[i] = i < count ? float(from[i]) : 0.0f;
}
/// The same of elements of a ScalarType, of which `begin` is the first.
inline void load_share(device const uchar* x, ulong begin, uint count, uint type,
                       thread float (&value)[ROTATE_VALUES]) {
  switch (type) {
  case SCALAR_FP16:
    return load_share(reinterpret_cast<device const half*>(x) + begin, count, value);
  case SCALAR_BF16:
    return load_share(reinterpret_cast<device const bfloat*>(x) + begin, count, value);
  default:
    return load_share(reinterpret_cast<device const float*>(x) + begin, count, value);
  }
}

/// H (suh * x) of a row of `columns` columns of a ScalarType that begins at element `row` of x; suh: this lane's.
inline void rotated_row(device const uchar* x, ulong row, uint columns, uint type, device const half* suh, uint first,
                        uint lane, thread float (&value)[ROTATE_VALUES]) {
  const uint count = first < columns ? columns - first : 0;
  float scale[ROTATE_VALUES];
  load_scales(suh, scale);
  load_share(x, row + first, count, type, value);
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i)
    value[i] = i < count ? value[i] * scale[i] : 0.0f;
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

/// A lane's share of svh of gate and up.
struct GateUpScales {
  float svh[2][ROTATE_VALUES];

  void load(thread const GateUpBuffers& from, uint expert, uint first) thread {
    load_scales(lane_scales(from.gate_biases, from.gate_table[expert].biases, first), svh[0]);
    load_scales(lane_scales(from.up_biases, from.up_table[expert].biases, first), svh[1]);
  }
};

/// act(svh_gate * H h[gate] + bias, svh_up * H h[up] + bias) of an assignment; beyond I whatever the function makes of
/// what stands there.
inline void unrotated_activation(thread const GateUpBuffers& from, thread const GateUpScales& scales, uint assignment,
                                 uint expert, uint first, uint lane, constant RotateArgs& args,
                                 thread float (&value)[ROTATE_VALUES]) {
  const uint padded = rotate_padded(args.intermediate);
  const ulong matrix = ulong(args.rows) * padded, slice = args.gated ? 2 * matrix : matrix;
  device const float* h = from.h + ulong(assignment) * padded + first;
  float both[2][ROTATE_VALUES];
  // Without a gate both are the same: what the function makes of the second is not looked at.
  load_values<2>(h, args.gated ? matrix : 0, args.slices, slice, both);
  rotate(both[0], lane);
  rotate(both[1], lane);
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i) {
    both[0][i] *= scales.svh[0][i];
    both[1][i] *= scales.svh[1][i];
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
  activate(args.activation, both[0], both[1], args.alpha, args.limit, value);
}

/// What the rotation of activations reads; see rotate.h.
struct ActivationBuffers {
  GateUpBuffers gate_up;
  device const uchar* down_scales;
  device const ExpertMatrix* down_table;
};

/// A lane's share of svh of gate and up and suh of down: nothing that another kernel makes.
struct ActivationScales {
  GateUpScales gate_up;
  float suh[ROTATE_VALUES];

  void load(thread const ActivationBuffers& from, uint expert, uint first) thread {
    gate_up.load(from.gate_up, expert, first);
    load_scales(lane_scales(from.down_scales, from.down_table[expert].scales, first), suh);
  }
};

/// H (suh_down * act(svh_gate * H h[gate] + bias, svh_up * H h[up] + bias)) of an assignment.
inline void rotated_activation(thread const ActivationBuffers& from, thread const ActivationScales& scales,
                               uint assignment, uint expert, uint first, uint lane, constant RotateArgs& args,
                               thread float (&value)[ROTATE_VALUES]) {
  unrotated_activation(from.gate_up, scales.gate_up, assignment, expert, first, lane, args, value);
  UNROLL_SHARE
  for (uint i = 0; i < ROTATE_VALUES; ++i) // columns beyond I: there are no weights for them
    value[i] = first + i < args.intermediate ? value[i] * scales.suh[i] : 0.0f;
  rotate(value, lane);
}
