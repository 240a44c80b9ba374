// Small operands that are read through a run-time type: router logits, routing weights, biases of the router, expert
// ids. One kernel serves every type of them; the few bytes they are do not pay for a kernel per type.
#pragma once
#include "simd.h"

/// Element type of a buffer that is read through `load_scalar`.
enum ScalarType : uint { SCALAR_FP32 = 0, SCALAR_FP16 = 1, SCALAR_BF16 = 2 };

/// What `load_id` gives for an id that names no expert (expert-parallel sentinels, padding).
SHARED_CONSTANT uint NO_EXPERT = 0xFFFFFFFFu;

#ifdef __METAL_VERSION__

/// Element `index` of a buffer of ScalarType `type`, as fp32.
inline float load_scalar(device const uchar* base, ulong index, uint type) {
  switch (type) {
  case SCALAR_FP16:
    return float(reinterpret_cast<device const half*>(base)[index]);
  case SCALAR_BF16:
    return float(reinterpret_cast<device const bfloat*>(base)[index]);
  default:
    return reinterpret_cast<device const float*>(base)[index];
  }
}

/// Rounds and stores element `index`.
inline void store_scalar(device uchar* base, ulong index, uint type, float value) {
  switch (type) {
  case SCALAR_FP16:
    reinterpret_cast<device half*>(base)[index] = half(value);
    break;
  case SCALAR_BF16:
    reinterpret_cast<device bfloat*>(base)[index] = bfloat(value);
    break;
  default:
    reinterpret_cast<device float*>(base)[index] = value;
  }
}

/// Element `index` of a buffer of ids, or NO_EXPERT where it is not one of 0..experts-1. `id_words`: 1 for int32, 2 for
/// int64, which is read as its two words (low first): a bound buffer is then aligned to 4 bytes whatever the type.
inline uint load_id(device const int* ids, ulong index, uint id_words, uint experts) {
  uint id, high = 0;
  if (id_words == 2) {
    id = uint(ids[2 * index]);
    high = uint(ids[2 * index + 1]);
  } else {
    id = uint(ids[index]);
  }
  return high == 0 && id < experts ? id : NO_EXPERT;
}

#endif
