// Rows of matrices in device memory, and how a lane reads a run of elements of one.
#pragma once
#include "simd.h"

/// N row pointers, passed together so that one loop can walk all of them.
template <typename T, uint N>
struct Rows {
  device const T* row[N];
  /// Elements from a row to the one that takes its place when the next N are read: an engine may ask memory for it
  /// early.
  ulong next = 0;
};

/// 16 bytes of elements: one load or store.
template <typename T>
struct alignas(16) Vector16 {
  static constexpr constant uint COUNT = 16 / sizeof(T);
  T element[COUNT];
};

/// 16 bytes of memory.
inline void load_vector(device const Vector16<uint>* from, thread Vector16<uint>& to) { to = *from; }

/// 16 bytes of what is read once, like the weights of a tile: an engine may keep them from displacing in its nearest
/// cache what is read again.
inline void load_vector_once(device const Vector16<uint>* from, thread Vector16<uint>& to) {
#ifdef METAL_SIM_CUDA
  metal_sim::cuda_load_once(from, &to);
#else
  to = *from;
#endif
}
