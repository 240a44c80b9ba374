// How products with trellis weights divide their inputs among threadgroups where these are few. Shared with the host.
#pragma once
#include "experts.h"

/// How many threadgroups a core of a GPU has at a time: the work of the core that has most of it decides.
SHARED_CONSTANT uint TRELLIS_AT_A_TIME = 3;
/// The most slices: what one kernel sums up, each threadgroup of the next reads again.
SHARED_CONSTANT uint TRELLIS_SLICES = 16;

/// Into how many slices of at most `most` blocks `blocks` blocks of 128 inputs are divided for so many threadgroups a
/// slice, on a GPU: those that leave the busiest core least to do, in blocks, of which each threadgroup costs one more
/// for its beginning. Cores with fewer threadgroups than they have room for are no faster for it.
constexpr uint trellis_slices(uint blocks, uint threadgroups, uint most) {
  const uint fewest = (blocks + most - 1) / most;
  if (threadgroups >= 1u << 24) // cores are full, and products of such numbers would not fit
    return fewest;
  uint best = 0, least = ~0u;
  for (uint slices = fewest; best == 0 || (slices <= TRELLIS_SLICES && slices <= blocks); ++slices) {
    const uint of_core = (slices * threadgroups + LARGE_GPU_CORES - 1) / LARGE_GPU_CORES;
    const uint work =
        (of_core > TRELLIS_AT_A_TIME ? of_core : TRELLIS_AT_A_TIME) * ((blocks + slices - 1) / slices + 1);
    if (work < least) {
      least = work;
      best = slices;
    }
  }
  return best;
}

/// The first of `blocks` blocks that slice s has; slices differ by one block at most.
constexpr uint trellis_slice(uint s, uint blocks, uint slices) { return s * blocks / slices; }
