// The record of one expert's quantised matrix, as docs/formats.md lays it out.
#pragma once
#include "../tiles/simd.h"

#ifdef __METAL_VERSION__

/// Row of a part's table.
struct ExpertMatrix {
  ulong codes; // where the matrix begins in each buffer, bytes
  ulong scales;
  ulong biases;
  uint codes_stride; // bytes between rows
  uint scales_stride;
  uint format; // WeightFormat, or that of trellis
  uint half_bits;
  uint group_size;
  uint codebook;
  uint scale_type;
  uint rows;
  uint columns;
  uint reserved;
};

#endif
