// Rows that a threadgroup stages in its memory: where their elements stand.
#pragma once
#include "simd.h"

/// Bytes between the end of a staged row and the next: rows then start in different threadgroup memory banks.
SHARED_CONSTANT uint ROW_PAD_BYTES = 16;

#ifdef __METAL_VERSION__

/// Rows of K_BYTES, one after the other.
template <typename T, uint K_BYTES>
struct PaddedRows {
  static constexpr constant uint LD = (K_BYTES + ROW_PAD_BYTES) / sizeof(T);
  static constexpr constant uint ROW_BYTES = K_BYTES + ROW_PAD_BYTES;

  /// Of the 16 bytes that begin at element k of a row.
  static uint at(uint row, uint k) { return row * LD + k; }
};

#endif
