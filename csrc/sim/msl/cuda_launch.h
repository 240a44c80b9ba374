// How kernels of one stream follow each other on NVIDIA GPUs from compute capability 9.0 on, where the threadgroups of
// a kernel may take their places before the kernel in front of it has ended. Called by entry points and by the kernels'
// tiles/early_start.h.
#pragma once
#include "scalar.h"

// Known where kernels are compiled for a GPU that is there.
#ifndef METAL_SIM_MULTIPROCESSORS
#define METAL_SIM_MULTIPROCESSORS 0
#endif

namespace metal_sim {

/// Lets the threadgroups of the next kernel take their places once all of this one's have asked for it or ended. Only
/// behind wait_for_previous_kernel(): then whatever came before this kernel is complete when the next one begins.
METAL_FUNC void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Waits until the kernel before has ended and its results are in memory. A launch that leaves multiprocessors free
/// then lets the next kernel start: beside a larger one its threadgroups would crowd where that ends first.
METAL_FUNC void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  const uint32_t leaves_some = uint64_t(gridDim.x) * gridDim.y * gridDim.z <= METAL_SIM_MULTIPROCESSORS;
  asm volatile("griddepcontrol.wait;" ::"r"(leaves_some) : "memory"); // an operand: known before the wait is over
  if (leaves_some)
    let_next_kernel_start();
#endif
}

} // namespace metal_sim
