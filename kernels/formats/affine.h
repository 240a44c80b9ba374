// Affine codes: weight = scale * code + bias, a scale and a bias per group of columns.
//
// Decoders: AffineRun<2>, AffineRun<3>, AffineRun<4>, AffineRun<5>, AffineRun<6>, AffineRun<8>
#pragma once
#include "quantized.h"

template <uint BITS_>
struct AffineRun {
  static constexpr constant uint FORMAT = FORMAT_AFFINE;
  static constexpr constant uint BITS = BITS_;
  static constexpr constant uint WORDS = BITS;
  static constexpr constant bool LINEAR = true;
  uint words[WORDS];
  float first;  // scale
  float second; // bias

  void load(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    load_scales(matrix, row, run);
    load_codes(matrix, row, run);
  }
  void load_codes(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    read_codes(matrix.row_codes(row) + run * (WORDS * 4), matrix.aligned, words);
  }
  void load_scales(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    const uint group = run >> matrix.group_shift;
    first = load_scale(matrix.row_scales(row), group, matrix.scale_type);
    second = load_scale(matrix.row_biases(row), group, matrix.scale_type);
  }

  /// 1 + code / 2^BITS: the code is the top of a float's mantissa, which takes no conversion.
  float element(uint i) thread const { return as_type<float>(0x3F800000u | code_at<BITS>(words, i) << (23 - BITS)); }
  float add(float sum, float part, float total) thread const {
    return fma(first * float(1u << BITS), part - total, fma(second, total, sum));
  }
  float weight(uint i) thread const { return fma(first, float(code_at<BITS>(words, i)), second); }
};
