// Arguments of `viterbi`: the closed walks through the trellis nearest to values.
#pragma once
#include "../formats/trellis.h"

SHARED_CONSTANT uint VITERBI_SIMDGROUPS = 16;

/// Values of a tile; states that a value may have.
SHARED_CONSTANT uint VITERBI_STEPS = TRELLIS_TILE * TRELLIS_TILE;
SHARED_CONSTANT uint VITERBI_STATES = 1u << TRELLIS_STATE_BITS;

/// Nodes of a row of costs: of the steps with the fewer new bits, where those alternate.
constexpr uint viterbi_nodes(uint half_bits) { return VITERBI_STATES >> half_bits / 2; }
/// fp32 costs that a threadgroup keeps: of all nodes before each step and after the last.
constexpr uint viterbi_history(uint half_bits) { return viterbi_nodes(half_bits) * (VITERBI_STEPS + 1); }

/// Threadgroup memory: the node between the last value and the first.
SHARED_CONSTANT uint VITERBI_MEMORY_BYTES = 4;

// Buffers: 0 values fp32 [tiles, 256], 1 table fp32 [65536] (the codebook, by state), 2 states out int32 [tiles, 256],
// 3 history fp32 [threadgroups, viterbi_history], 4 ViterbiArgs; threadgroup 0: VITERBI_MEMORY_BYTES.
// Grid: as many threadgroups as there is history for.
struct ViterbiArgs {
  uint tiles;
  uint half_bits; // 2 to 16
};
