// Loads of NVIDIA GPUs that Metal has no word for. Called by the kernels' tiles/rows.h.
#pragma once
#include "scalar.h"

namespace metal_sim {

/// 16 bytes that a kernel reads once and nobody writes meanwhile: past the L1 cache, where they would only displace
/// what is read again, and in whole cache lines of memory.
template <typename V>
METAL_FUNC void cuda_load_once(const void* from, V* to) {
  static_assert(sizeof(V) == sizeof(uint4));
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  *to = __builtin_bit_cast(V, words);
}

/// A word that a kernel in front of the previous one may have written: past the L1 cache, for a kernel that has not
/// waited for the previous one.
METAL_FUNC int cuda_load_fresh(const int* from) {
  int word;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

/// Asks for memory that will be read soon, multiples of 16 bytes: to the L2 cache, without registers and without
/// waiting.
METAL_FUNC void cuda_prefetch(const void* from, uint bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

/// The same of the cache line that `from` lies in.
METAL_FUNC void cuda_prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

} // namespace metal_sim
