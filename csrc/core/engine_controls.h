// Settings that only the stand-in for Metal has. On Apple's Metal setting them does nothing.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace metal_moe {

/// Threads that the native engine computes with; at least 1.
void set_num_threads(int threads);
/// 0 on Apple's Metal.
int num_threads();

/// Seed of the exact engine's schedule.
void set_exact_seed(uint64_t seed);

/// Where the cuda engine looks for NVRTC before the system's own places.
void set_nvrtc_path(const std::string& path);

/// Machine code of a kernel for an NVIDIA GPU of compute capability `architecture` (90: sm_90), with bits of its
/// function constants by index. std::runtime_error where it does not compile.
std::string compile_cuda_kernel(const std::string& library, const std::string& kernel,
                                const std::map<uint32_t, uint32_t>& constants, int architecture);

} // namespace metal_moe
