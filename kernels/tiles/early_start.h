// Work of a kernel that need not wait for the kernel before it.
//
// An engine may start a kernel before the one in front of it has ended; by itself it then waits for that end before it
// runs any of the kernel's code. A kernel whose own body calls wait_for_previous_kernel() is not made to wait: it does
// so itself, and ahead of the call it may
//  - read what the kernel right before it does not write. All that came earlier is complete and in memory, since a
//    kernel lets the next one start only when its own wait is over. Which kernel that is, is known inside an operation
//    (down after gate_up) and not at its beginning: there anyone may just have written the operation's tensors.
//  - not write: the kernel before may still read what an engine gives to this one.
// A thread writes, and reads what the kernel before has written, only after its own call. On engines whose kernels
// never overlap the functions are empty; `exact` holds kernels to these rules.
#pragma once
#include "simd.h"

/// Returns when the kernel before has ended and its results are in memory. Any thread may call it, any number of times;
/// a thread that returns without a call waits then.
inline void wait_for_previous_kernel() {
#if defined(METAL_SIM_CUDA) || defined(METAL_SIM_EXACT)
  metal_sim::wait_for_previous_kernel();
#endif
}

/// Lets the next kernel start beside this one, also where this one leaves no cores free, which an engine sees to
/// itself. Behind the wait only. Of use where the next kernel has work ahead of its own wait.
inline void let_next_kernel_start() {
#ifdef METAL_SIM_CUDA
  metal_sim::let_next_kernel_start();
#endif
}

/// Asks for memory that will be read soon, `from` and `bytes` multiples of 16, without waiting for it. What is in front
/// of wait_for_previous_kernel() often is a way to such an address: values that are read anew behind it.
inline void prefetch(device const void* from, uint bytes) {
#ifdef METAL_SIM_CUDA
  metal_sim::cuda_prefetch(from, bytes);
#else
  (void)from, (void)bytes;
#endif
}

/// The same of the cache line that `from` lies in.
inline void prefetch_line(device const void* from) {
#ifdef METAL_SIM_CUDA
  metal_sim::cuda_prefetch_line(from);
#else
  (void)from;
#endif
}
