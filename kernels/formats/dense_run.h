// Dense weights as a format: fp32, fp16 or bf16 rows as they are, whatever the activations' type, beside quantised ones
// (shared experts, or some of the routed ones). Where all weights of a product are dense they have kernels of their
// own.
//
// Decoders: DenseRun<WORD_BITS / 2>, DenseRun<WORD_BITS>
#pragma once
#include "quantized.h"

/// A run of dense weights, 4 or 8 times as long as one of 4-bit codes: it is read where it is used, not kept.
template <uint BITS_>
struct DenseRun {
  static constexpr constant uint FORMAT = FORMAT_DENSE;
  static constexpr constant uint BITS = BITS_;
  static constexpr constant uint WORDS = BITS;
  static constexpr constant bool LINEAR = false;
  static constexpr constant uint PER_WORD = WORD_BITS / BITS;
  device const uchar* from;
  uint type;
  bool aligned;

  void load(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    load_scales(matrix, row, run);
    from = matrix.row_codes(row) + ulong(run) * (WORDS * 4);
    aligned = matrix.aligned;
  }
  void load_scales(thread const QuantizedMatrix& matrix, uint, uint) thread { type = matrix.scale_type; }
  float element(uint i) thread const {
    if (BITS != WORD_BITS && !aligned) // rows may begin at any element
      return load_scale(from, i, type);
    const uint index = i / PER_WORD;
    // The vector's other elements are asked for next: one load.
    const uint word = aligned ? reinterpret_cast<device const Vector16<uint>*>(from)[index / 4].element[index % 4]
                              : reinterpret_cast<device const uint*>(from)[index];
    if (BITS == WORD_BITS)
      return as_type<float>(word);
    const ushort bits = i % PER_WORD == 0 ? word : word >> 16;
    return type == SCALE_FP16 ? float(as_type<half>(bits)) : as_type<float>(uint(bits) << 16);
  }
  float add(float sum, float part, float) thread const { return sum + part; }
  float weight(uint i) thread const { return element(i); }
};
