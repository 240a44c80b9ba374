// Settings of the stand-in that Metal has no call for.
#pragma once

#include <cstdint>

namespace metal_sim {

/// Threads that a dispatch of the native engine spreads over, the calling one included; at least 1. Initially
/// METAL_MOE_NUM_THREADS, or the processors this process may run on. Takes effect from the next dispatch.
void set_num_threads(int threads);
int num_threads();

/// Seed of the exact engine's schedule: order of threadgroups, and of threads between meeting points. Initially
/// METAL_MOE_EXACT_SEED, or 0. The same seed gives the same schedule.
void set_exact_seed(uint64_t seed);
uint64_t exact_seed();

} // namespace metal_sim
