// Dense weights: fp32, fp16 or bf16, [experts, rows, K], rows contiguous.
#pragma once
#include "../tiles/simd.h"

/// The matrix of one expert. Routed experts 0..E-1 stand in one tensor, shared experts E, E + 1, ... in another with a
/// row count of its own. 64-bit: one layer of DeepSeek-V3 has 7.5e9 elements.
template <typename T>
inline device const T* dense_expert(device const T* routed, device const T* shared, uint expert, uint experts,
                                    ulong routed_elements, ulong shared_elements) {
  return expert < experts ? routed + ulong(expert) * routed_elements
                          : shared + ulong(expert - experts) * shared_elements;
}
