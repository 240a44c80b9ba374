// Block floating point: mxfp4, and mxfp8 and nvfp4, which differ in element, block and scale.
//
// An element is read as the fp16 number with the same sign, exponent and mantissa bits. Its exponent's bias is another,
// which multiplies by a power of two (UNIT) once per run.
//
// Decoders: MxRun<FORMAT_MXFP4, 4>, MxRun<FORMAT_MXFP8, 8>, NvRun
#pragma once
#include "quantized.h"

/// Values of e2m1 and e4m3 codes, over E2M1_UNIT and E4M3_UNIT.
constexpr constant float E2M1_UNIT = 16384.0f;
constexpr constant float E4M3_UNIT = 256.0f;
inline float e2m1(uint code) { return float(as_type<half>(ushort((code & 8) << 12 | (code & 7) << 9))); }
inline float e4m3(uint code) {
  const uint bits = (code & 0x80) << 8 | (code & 0x7F) << 7;
  return float(as_type<half>(ushort((code & 0x7F) == 0x7F ? 0x7E00 : bits))); // its one NaN
}

/// 2^(code - 127); 255 is NaN.
inline float e8m0(uint code) {
  return as_type<float>(code == 0 ? 0x00400000u : code == 255 ? 0x7FC00000u : code << 23);
}

/// Blocks of RUN_ELEMENTS with an e8m0 scale: mxfp4, mxfp8.
template <uint FORMAT_, uint BITS_>
struct MxRun {
  static constexpr constant uint FORMAT = FORMAT_;
  static constexpr constant uint BITS = BITS_;
  static constexpr constant uint WORDS = BITS;
  static constexpr constant bool LINEAR = false;
  static constexpr constant float UNIT = BITS == 4 ? E2M1_UNIT : E4M3_UNIT;
  uint words[WORDS];
  float first; // scale
  float second;

  void load(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    load_scales(matrix, row, run);
    load_codes(matrix, row, run);
  }
  void load_codes(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    read_codes(matrix.row_codes(row) + run * (WORDS * 4), matrix.aligned, words);
  }
  void load_scales(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    first = e8m0(matrix.row_scales(row)[run]);
    second = 0.0f;
  }
  float element(uint i) thread const {
    const uint code = code_at<BITS>(words, i);
    return BITS == 4 ? e2m1(code) : e4m3(code);
  }
  // The unit first: a large scale times it may overflow.
  float add(float sum, float part, float) thread const { return fma(part * UNIT, first, sum); }
  float weight(uint i) thread const { return element(i) * UNIT * first; }
};

/// Two blocks of 16 elements with an e4m3 scale each.
struct NvRun {
  static constexpr constant uint FORMAT = FORMAT_NVFP4;
  static constexpr constant uint BITS = 4;
  static constexpr constant uint WORDS = BITS;
  static constexpr constant bool LINEAR = false;
  uint words[WORDS];
  float first; // scales
  float second;

  void load(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    load_scales(matrix, row, run);
    load_codes(matrix, row, run);
  }
  void load_codes(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    read_codes(matrix.row_codes(row) + run * (WORDS * 4), matrix.aligned, words);
  }
  void load_scales(thread const QuantizedMatrix& matrix, uint row, uint run) thread {
    device const uchar* scales = matrix.row_scales(row) + 2 * run;
    first = e4m3(scales[0]) * (E4M3_UNIT * E2M1_UNIT);
    second = e4m3(scales[1]) * (E4M3_UNIT * E2M1_UNIT);
  }
  float element(uint i) thread const { return e2m1(code_at<BITS>(words, i)) * (i < RUN_ELEMENTS / 2 ? first : second); }
  float add(float sum, float part, float) thread const { return sum + part; }
  float weight(uint i) thread const { return element(i); }
};
