// Arguments of `gather_experts`: the weights of selected experts, copied to [n, in, out] without a host read.
#pragma once
#include "../tiles/simd.h"

SHARED_CONSTANT uint GATHER_SIMDGROUPS = 8;
/// Bytes that one threadgroup copies.
SHARED_CONSTANT uint GATHER_BLOCK_BYTES = 1u << 16;

// Buffers: 0 weights [E, bytes_per_expert], 1 ids, 2 out [count, bytes_per_expert], 3 GatherArgs.
// Grid: (ceil(bytes_per_expert / GATHER_BLOCK_BYTES), count). An id outside 0..E-1 gives zeros.
struct GatherArgs {
  uint count;
  uint experts;
  uint id_stride;            // elements of the id type
  uint id_words;             // 1 int32, 2 int64
  uint unit_bytes;           // 16, 8, 4, 2 or 1: largest that divides bytes_per_expert and both buffer offsets
  uint bytes_per_expert_low; // 64-bit size in two words: MSL and the host agree on no alignment trap
  uint bytes_per_expert_high;
};
