// Quantised weights: the record of an expert's matrix, as docs/formats.md lays it out, and what decoders share.
//
// A decoder is a struct that holds a run, RUN_ELEMENTS consecutive elements of a row as they are in memory:
//
//   FORMAT, BITS, WORDS        which it is, and the 32-bit words of its codes
//   LINEAR                     whether weight(i) is first * code + second
//   words[WORDS]               codes
//   first, second              scale and bias, or what else the format has beside them
//   load(matrix, row, run)     reads run number `run` of a row: load_scales, then load_codes
//   element(i)                 what element i is multiplied as: cheap, of the format's own unit and zero
//   add(sum, part, total)      sum + the dot product of run and x, where part = sum of element(i) * x[i] and total =
//                              sum of x[i]
//   weight(i)                  element i as the weight it stands for
//
// A format's header lists its decoders in a line, "// Decoders: AffineRun<2>, AffineRun<3>". The build gathers them in
// `decoders.h`, which goes from a record to its decoder.
#pragma once
#include "../tiles/rows.h"
#include "expert_matrix.h"
#include "specialized.h"

/// ExpertMatrix::format.
enum WeightFormat : uint { FORMAT_AFFINE = 1, FORMAT_MXFP4 = 2, FORMAT_MXFP8 = 3, FORMAT_NVFP4 = 4, FORMAT_DENSE = 6 };
/// ExpertMatrix::scale_type.
enum ScaleFormat : uint { SCALE_FP32 = 0, SCALE_FP16 = 1, SCALE_BF16 = 2, SCALE_E8M0 = 3, SCALE_E4M3 = 4 };

constexpr constant uint WORD_BITS = 8 * sizeof(uint);
/// One element per bit of a word: a run of any whole number of bits per element is whole words, and every group is
/// whole runs (nvfp4: half ones). What is left of a row after them: tail.h.
constexpr constant uint RUN_ELEMENTS = WORD_BITS;
/// Words of the widest run.
constexpr constant uint RUN_MAX_WORDS = 8;

/// The matrix of one expert.
struct QuantizedMatrix {
  device const uchar* codes;
  device const uchar* scales;
  device const uchar* biases;
  uint codes_stride;
  uint scales_stride;
  uint format;
  uint bits;
  uint group_shift; // log2 of runs per group
  uint scale_type;
  bool aligned; // rows of codes start at multiples of 16 bytes

  device const uchar* row_codes(uint row) thread const { return codes + ulong(row) * codes_stride; }
  device const uchar* row_scales(uint row) thread const { return scales + ulong(row) * scales_stride; }
  device const uchar* row_biases(uint row) thread const { return biases + ulong(row) * scales_stride; }
};

constexpr uint group_shift(uint group_size) {
  return uint(group_size >= 2 * RUN_ELEMENTS) + uint(group_size >= 4 * RUN_ELEMENTS);
}

/// Takes from `code` (see matrix_code.h; 0: none) what it tells of a matrix, which says the same: constants where the
/// kernel is compiled for it.
inline void specialize(thread QuantizedMatrix& matrix, uint code) {
  if (code == 0)
    return;
  matrix.format = code_format(code);
  matrix.bits = code_half_bits(code) / 2;
  matrix.group_shift = group_shift(code_group_size(code));
  matrix.scale_type = code_scale_type(code);
  if (code_aligned(code))
    matrix.aligned = true;
}

/// Of `expert` in a part's buffers, which begin at multiples of 16 bytes; `code`: of the part, or 0.
inline QuantizedMatrix expert_matrix(device const uchar* codes, device const uchar* scales, device const uchar* biases,
                                     device const ExpertMatrix* table, uint expert, uint code) {
  const ExpertMatrix record = table[expert];
  QuantizedMatrix matrix;
  matrix.codes = codes + record.codes;
  matrix.scales = scales + record.scales;
  matrix.biases = biases + record.biases;
  matrix.codes_stride = record.codes_stride;
  matrix.scales_stride = record.scales_stride;
  matrix.format = record.format;
  matrix.bits = record.half_bits / 2;
  matrix.group_shift = group_shift(record.group_size);
  matrix.scale_type = record.scale_type;
  matrix.aligned = (uint(record.codes) | record.codes_stride) % sizeof(Vector16<uint>) == 0;
  specialize(matrix, code);
  return matrix;
}

/// One projection of all experts: buffers that begin at multiples of 16 bytes, and a record per expert.
struct ExpertPart {
  device const uchar* codes;
  device const uchar* scales;
  device const uchar* biases;
  device const ExpertMatrix* table;

  /// `code`: of the part, or 0.
  QuantizedMatrix of(uint expert, uint code) thread const {
    return expert_matrix(codes, scales, biases, table, expert, code);
  }
};

/// Of routed experts 0..E-1 or of shared ones E, E + 1, ..., which are a part of their own. `code`: of both, or 0.
inline QuantizedMatrix expert_matrix(thread const ExpertPart& routed, thread const ExpertPart& shared, uint expert,
                                     uint experts, uint code) {
  return expert < experts ? routed.of(expert, code) : shared.of(expert - experts, code);
}

/// The codes of a run: WORDS words from a multiple of 4 bytes; where rows are `aligned`, in the widest loads that every
/// run allows.
template <uint WORDS>
inline void read_codes(device const uchar* from, bool aligned, thread uint (&words)[WORDS]) {
  if (WORDS % 4 == 0 && aligned) {
    UNROLL
    for (uint v = 0; v < WORDS / 4; ++v) {
      Vector16<uint> vector;
      load_vector_once(reinterpret_cast<device const Vector16<uint>*>(from) + v, vector);
      UNROLL
      for (uint i = 0; i < 4; ++i)
        words[4 * v + i] = vector.element[i];
    }
  } else if (WORDS % 2 == 0 && aligned) {
    UNROLL
    for (uint v = 0; v < WORDS / 2; ++v) {
      const uint2 pair = reinterpret_cast<device const uint2*>(from)[v];
      words[2 * v] = pair.x;
      words[2 * v + 1] = pair.y;
    }
  } else {
    UNROLL
    for (uint i = 0; i < WORDS; ++i)
      words[i] = reinterpret_cast<device const uint*>(from)[i];
  }
}

/// Code i of a run of BITS bits per element.
template <uint BITS, uint WORDS>
inline uint code_at(thread const uint (&words)[WORDS], uint i) {
  const uint word = i * BITS / WORD_BITS, shift = i * BITS % WORD_BITS;
  uint code = words[word] >> shift;
  if (shift + BITS > WORD_BITS)
    code |= words[min(word + 1, WORDS - 1)] << (WORD_BITS - shift);
  return code & ((1u << BITS) - 1);
}

/// A scale or bias of type fp32, fp16 or bf16.
inline float load_scale(device const uchar* from, uint index, uint type) {
  if (type == SCALE_FP32)
    return reinterpret_cast<device const float*>(from)[index];
  const ushort bits = reinterpret_cast<device const ushort*>(from)[index];
  return type == SCALE_FP16 ? float(as_type<half>(bits)) : as_type<float>(uint(bits) << 16);
}
