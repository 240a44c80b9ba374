// Arguments of the kernels that rotate activations for trellis weights: `rotate_inputs`, `rotate_activations`,
// `rotate_outputs`.
#pragma once
#include "../tiles/hadamard.h"
#include "../tiles/scalar.h"
#include "experts.h"

/// Simdgroups of a threadgroup, each with a block of 128 columns: few, so that one token has several threadgroups.
SHARED_CONSTANT uint ROTATE_SIMDGROUPS = 4;
/// Simdgroups of a threadgroup of rotate_outputs, which takes one block and has a simdgroup for each of that many
/// slots.
SHARED_CONSTANT uint ROTATE_OUTPUT_SIMDGROUPS = 8;
/// Its threadgroup memory: the parts of those slots.
SHARED_CONSTANT uint ROTATE_OUTPUT_BYTES = ROTATE_OUTPUT_SIMDGROUPS * HADAMARD_BLOCK * 4;

constexpr uint rotate_blocks(uint columns) { return (columns + HADAMARD_BLOCK - 1) / HADAMARD_BLOCK; }
/// Columns as trellis weights have them.
constexpr uint rotate_padded(uint columns) { return rotate_blocks(columns) * HADAMARD_BLOCK; }

// Rows of assignments stand in order of assignment, a = token * top_k + slot; S = tokens * top_k. H' and I' are H and I
// rounded up to multiples of 128. `gate` stands for the one matrix of layers without a gate. Scales (suh) and biases
// (svh) are buffers of a part, tables hold its ExpertMatrix records. What a product made in `slices` slices of its
// inputs is the sum of them. rotated_stride: elements of 4 bytes, see rotated_row.h.
//
//  rotate_inputs      : 0 x [T, H], 1 ids, 2 gate scales, 3 gate table, 4 up scales, 5 up table, 6 out [1 or 2
//                       (gate, up), S, rotated_stride], 7 RotateArgs. Grid (ceil(blocks of H / simdgroups), S, 1 or 2).
//  rotate_activations : 0 h fp32 [slices, 1 or 2, S, I'], 1 ids, 2 bias1 [E, 2I (gate, then up) or I], 3 gate biases,
//                       4 gate table, 5 up biases, 6 up table, 7 down scales, 8 down table, 9 out
//                       [S, rotated_stride], 10 RotateArgs. Grid (ceil(blocks of I / simdgroups), S).
//  rotate_outputs     : 0 y fp32 [slices, S, H'], 1 ids, 2 topk_weights, 3 bias2 [E, H], 4 down biases, 5 down table,
//                       6 out [T, H], 7 RotateArgs; threadgroup 0: ROTATE_OUTPUT_BYTES. Grid (blocks of H, T).
struct RotateArgs {
  uint hidden;       // H
  uint intermediate; // I
  uint experts;      // E
  uint rows;         // S
  uint slices;       // of h, or of y
  uint top_k;
  uint type;             // ScalarType of x, biases and out
  uint x_row_stride;     // elements
  uint ids_token_stride; // elements of the id type
  uint ids_slot_stride;
  uint id_words;             // 32-bit words of an id: 1 int32, 2 int64
  uint weights_token_stride; // elements
  uint weights_slot_stride;
  uint weights_type; // ScalarType
  uint gated;        // 0: h is act(gate), and there is no up
  uint has_bias1;
  uint has_bias2;
  uint activation; // Activation
  float alpha;
  float limit;
};
