// Settings that only the stand-in for Metal has. On Apple's Metal setting them does nothing.
#pragma once

#include <cstdint>

namespace metal_moe {

/// Threads that the native engine computes with; at least 1.
void set_num_threads(int threads);
/// 0 on Apple's Metal.
int num_threads();

/// Seed of the exact engine's schedule.
void set_exact_seed(uint64_t seed);

} // namespace metal_moe
