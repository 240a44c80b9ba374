// What kernels of the exact engine ask of it. Defined in exact_support.cpp, which is compiled without memory checks:
// the other lanes' values stand in the engine's memory.
#pragma once

#include "scalar.h"

namespace metal_sim {

/// Largest value that a simdgroup function exchanges.
constexpr size_t MAX_EXCHANGE_BYTES = 1024;

/// `memory`: MSL's mem_flags.
void exact_threadgroup_barrier(uint32_t memory);
void exact_simdgroup_barrier(uint32_t memory);
/// This thread's lane.
uint32_t exact_lane();
/// Publishes `bytes` at `value` and waits for the simdgroup. Copies what lane i published to `all + i * bytes` and
/// returns one bit per lane that took part; the places of the others are zeroed.
uint64_t exact_exchange(const char* operation, const void* value, size_t bytes, void* all);
/// The same, but copies only what `lane` published. False, and `result` untouched, if that lane took no part.
bool exact_exchange_one(const char* operation, const void* value, size_t bytes, uint32_t lane, void* result);
/// Whether this thread works ahead of the end of the dispatch in front.
void exact_work_ahead(bool ahead);

METAL_FUNC void wait_for_previous_kernel() { exact_work_ahead(false); }

} // namespace metal_sim
