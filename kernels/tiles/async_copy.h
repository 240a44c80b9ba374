// Copies from device to threadgroup memory that may run beside arithmetic.
//
// A thread starts copies (copy_async), closes them to a group (copy_commit) and later waits until at most PENDING of
// its latest groups are still under way (copy_wait). What others copied is there after the barrier that follows. Where
// a GPU has no such copies they are over at once, and the calls cost nothing.
#pragma once
#include "rows.h"

/// 16 bytes, both addresses multiples of 16; zeros where not `inside`, and `from` is not read then.
template <typename T>
inline void copy_async(threadgroup T* to, device const T* from, bool inside) {
#ifdef METAL_SIM_CUDA
  metal_sim::copy_async(to, from, inside);
#else
  *reinterpret_cast<threadgroup uint4*>(to) = inside ? *reinterpret_cast<device const uint4*>(from) : uint4(0);
#endif
}

inline void copy_commit() {
#ifdef METAL_SIM_CUDA
  metal_sim::copy_commit();
#endif
}

template <uint PENDING>
inline void copy_wait() {
#ifdef METAL_SIM_CUDA
  metal_sim::copy_wait<PENDING>();
#endif
}
