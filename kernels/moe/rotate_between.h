// Arguments of the kernels between two products of which one alone has trellis weights: `unrotate_activations`,
// `rotate_intermediate`.
#pragma once
#include "rotate.h"

// Rows of the intermediate h are of the type and order that other products give and take: see experts.h.
//
//  unrotate_activations: 0 sums fp32 [slices, 1 or 2, S, I'], 1 ids, 2 bias1, 3 gate biases, 4 gate table, 5 up biases,
//                        6 up table, 7 inverse [S] of rows that are sorted, 8 h out [S, h_row_stride],
//                        9 RotateBetweenArgs.
//  rotate_intermediate : 0 h [S, h_row_stride], 1 ids, 2 down scales, 3 down table, 4 inverse [S], 5 out
//                        [S, rotated_stride], 6 RotateBetweenArgs.
// Grid (ceil(blocks of I / simdgroups), S) of both.
struct RotateBetweenArgs {
  RotateArgs rotate;
  uint h_row_stride; // elements
  uint sorted;       // rows of h are; 0: in order of assignments
};
