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

/// N consecutive elements as fp32. VECTORIZED: `from` is a multiple of 16 bytes, and loads are 16 bytes wide.
template <uint N, bool VECTORIZED, typename T>
inline void load_elements(device const T* from, thread float (&to)[N]) {
  if (VECTORIZED) {
    constexpr uint COUNT = Vector16<T>::COUNT;
    UNROLL
    for (uint i = 0; i < N; i += COUNT) {
      const Vector16<T> v = *reinterpret_cast<device const Vector16<T>*>(from + i);
      UNROLL
      for (uint j = 0; j < COUNT; ++j)
        to[i + j] = float(v.element[j]);
    }
  } else {
    UNROLL
    for (uint i = 0; i < N; ++i)
      to[i] = float(from[i]);
  }
}
