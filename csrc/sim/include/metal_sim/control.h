// Settings of the stand-in that Metal has no call for.
#pragma once

#include "Metal/Metal.hpp"

#include <cstdint>
#include <map>
#include <string>

namespace metal_sim {

/// Threads that a dispatch of the native engine spreads over, the calling one included; at least 1. Initially
/// METAL_MOE_NUM_THREADS, or the processors this process may run on. Takes effect from the next dispatch.
void set_num_threads(int threads);
int num_threads();

/// Seed of the exact engine's schedule: order of threadgroups, and of threads between meeting points. Initially
/// METAL_MOE_EXACT_SEED, or 0. The same seed gives the same schedule.
void set_exact_seed(uint64_t seed);
uint64_t exact_seed();

/// A device that accepts everything the native one does, and whose command buffers complete without running a kernel:
/// outputs stay as they were. For benchmarks of what encoding and committing cost. Owned by the caller; not among
/// MTL::CopyAllDevices().
MTL::Device* null_device();

/// The NVIDIA GPU `ordinal` as a device, owned by the caller: "cuda (NVIDIA H200, sm_90)", "cuda:1 (...)". Null and an
/// error where there is no driver or no such GPU. Not among MTL::CopyAllDevices(): asking for it starts CUDA in this
/// process.
MTL::Device* cuda_device(int ordinal, NS::Error** error);

/// A command buffer of a cuda device's queue, owned by the caller, that launches on `stream` (a CUstream) when it is
/// committed, behind what is there, and waits for nothing. It then counts as completed: what kernels do is in the order
/// of the stream, and so must be whatever reuses their memory. An error is one of launching; what goes wrong on the GPU
/// later is CUDA's to report. While the stream is captured the launches become part of the graph.
MTL::CommandBuffer* new_stream_command_buffer(MTL::CommandQueue* queue, void* stream);

/// Where NVRTC is looked for when none is loaded yet, before the system's own places. METAL_MOE_NVRTC has precedence.
void set_nvrtc_path(const std::string& path);

/// Machine code (a cubin) of a kernel of the metallib `library` for compute capability `architecture` (90: sm_90), as a
/// pipeline would use it; needs no GPU. `constants`: bits of function constants by index. std::runtime_error with the
/// compiler's messages.
std::string compile_cuda_kernel(const std::string& library, const std::string& kernel,
                                const std::map<uint32_t, uint32_t>& constants, int architecture);

} // namespace metal_sim
