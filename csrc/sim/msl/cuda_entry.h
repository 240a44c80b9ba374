// What an entry point on an NVIDIA GPU is written with: its parameters are the kernel's buffers as pointers, its
// constants by value, and the place of its threadgroup arguments in the shared memory of the launch.
#pragma once

// Aligned for the swizzled rows of cuda_tile.h.
extern __shared__ __align__(1024) uint4 metal_sim_threadgroup_memory[];

namespace metal_sim {

template <typename T>
struct EntryParameter;
template <typename T>
struct EntryParameter<T*> {
  using type = T*;
};
template <typename T>
struct EntryParameter<const T&> {
  using type = T;
};

/// A grid may take several launches: the first threadgroup of this one, and the whole grid.
struct LaunchGrid {
  Size3 first;
  Size3 grid;
};

METAL_FUNC ThreadContext cuda_context(const LaunchGrid& launch) {
  ThreadContext context;
  context.threadgroups_per_grid = launch.grid;
  context.threads_per_threadgroup = {blockDim.x, blockDim.y, blockDim.z};
  context.threadgroup_position_in_grid = {blockIdx.x, launch.first.y + blockIdx.y, launch.first.z + blockIdx.z};
  context.thread_position_in_threadgroup = {threadIdx.x, threadIdx.y, threadIdx.z};
  const uint32_t index = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  context.thread_index_in_threadgroup = index;
  context.thread_index_in_simdgroup = index % SIMD_WIDTH;
  context.simdgroup_index_in_threadgroup = index / SIMD_WIDTH;
  context.simdgroups_per_threadgroup = (blockDim.x * blockDim.y * blockDim.z + SIMD_WIDTH - 1) / SIMD_WIDTH;
  return context;
}

METAL_FUNC void* cuda_threadgroup_memory(uint32_t offset) {
  return reinterpret_cast<unsigned char*>(metal_sim_threadgroup_memory) + offset;
}

} // namespace metal_sim
