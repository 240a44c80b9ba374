// Dot products of quantised rows for an engine whose simdgroup is one thread. Called by the kernels'
// moe/gemv_quantized.h with the decoder (`Run`, kernels/formats/quantized.h) of the rows' format: it says what scales
// and codes are worth. Here a run becomes vectors of weights; a format whose codes are beyond what is here has its
// weights one by one from its decoder.
#pragma once
#include "native_integer_dot.h"

namespace metal_sim {

/// The longest group of one scale.
constexpr uint QUANTIZED_GROUP = 128;

/// Of kernels/formats/quantized.h: WeightFormat, where a format has code of its own here, and ScaleFormat.
enum QuantizedFormat : uint { QUANTIZED_AFFINE = 1, QUANTIZED_MXFP8 = 3, QUANTIZED_DENSE = 6 };
enum QuantizedScale : uint { QUANTIZED_FP32 = 0, QUANTIZED_FP16 = 1 };

/// How the runs of a group become vectors.
enum class RunKind {
  Generic, // element by element
  Dense,   // fp32, fp16 or bf16 as they are
  Table,   // codes of up to 4 bits: a table of all weights, made once per group
  Linear,  // scale * code + bias, applied to the sums of a group
  Float8   // e4m3 * scale
};

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr bool QUANTIZED_TABLES = true;
constexpr uint QUANTIZED_TABLE_BITS = 4; // of codes that a single permutation looks up
#elif defined(__AVX2__) && defined(__F16C__)
constexpr bool QUANTIZED_TABLES = true;
constexpr uint QUANTIZED_TABLE_BITS = 3;
#else
constexpr bool QUANTIZED_TABLES = false;
constexpr uint QUANTIZED_TABLE_BITS = 0;
#endif

template <typename Run>
constexpr RunKind run_kind() {
  if (uint(Run::FORMAT) == QUANTIZED_DENSE)
    return RunKind::Dense;
  if (Run::BITS <= QUANTIZED_TABLE_BITS)
    return RunKind::Table;
  if (Run::LINEAR)
    return RunKind::Linear;
  if (QUANTIZED_TABLES && Run::BITS <= 4)
    return RunKind::Table;
  if (QUANTIZED_TABLES && uint(Run::FORMAT) == QUANTIZED_MXFP8)
    return RunKind::Float8;
  return RunKind::Generic;
}

/// The weights of the runs of one group of a row: `group` has its scales, `codes` are those of its first run. What at()
/// gives is multiplied with x and added up; finish() makes what that sum stands for of it, `total` being the sum of x.
template <typename Run, RunKind KIND = run_kind<Run>()>
struct GroupWeights {
  Run decoder;
  const uchar* codes;
  alignas(64) float weights[QUANTIZED_RUN];

  METAL_FUNC GroupWeights(const Run& group, const uchar* from) : decoder(group), codes(from) {}
  METAL_FUNC void read(uint run) {
    __builtin_memcpy(decoder.words, codes + run * sizeof decoder.words, sizeof decoder.words);
    for (uint i = 0; i < QUANTIZED_RUN; ++i)
      weights[i] = decoder.weight(i);
  }
  /// DOT_LANES elements of the run that was read, from element i on.
  METAL_FUNC DotVector at(uint i) const { return dot_load(weights + i); }
  METAL_FUNC DotVector finish(DotVector sum, DotVector) const { return sum; }
};

template <typename Run>
struct GroupWeights<Run, RunKind::Dense> {
  const uchar* codes;
  const uchar* run;
  uint type;

  METAL_FUNC GroupWeights(const Run& group, const uchar* from) : codes(from), type(group.type) {}
  METAL_FUNC void read(uint index) { run = codes + index * QUANTIZED_RUN * (Run::BITS / 8); }
  METAL_FUNC DotVector at(uint i) const {
    const uchar* from = run + i * (Run::BITS / 8);
    if constexpr (Run::BITS == 32)
      return dot_load(reinterpret_cast<const float*>(from));
    else
      return type == QUANTIZED_FP16 ? dot_load(reinterpret_cast<const half*>(from))
                                    : dot_load(reinterpret_cast<const bfloat*>(from));
  }
  METAL_FUNC DotVector finish(DotVector sum, DotVector) const { return sum; }
};

/// Two halves of a run whose elements have the codes 0, 1, 2, ..., modulo their number.
template <uint BITS>
struct CountingCodes {
  uint32_t words[BITS];

  constexpr CountingCodes() : words() {
    for (uint i = 0; i < QUANTIZED_RUN; ++i)
      for (uint b = 0; b < BITS; ++b)
        if (i >> b & 1)
          words[(i * BITS + b) / 32] |= 1u << (i * BITS + b) % 32;
  }
};
template <uint BITS>
constexpr CountingCodes<BITS> counting_codes{};

/// The weights of all codes, of the first and of the second half of a run, which may have scales of their own.
template <typename Run>
METAL_FUNC void code_table(const Run& group, float (&table)[QUANTIZED_RUN]) {
  Run counting = group;
  __builtin_memcpy(counting.words, counting_codes<Run::BITS>.words, sizeof counting.words);
  _Pragma("GCC unroll 64") for (uint i = 0; i < QUANTIZED_RUN; ++i) table[i] = counting.weight(i);
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

/// For the 16 codes of half a run: the word in which each begins, and where in it.
template <uint BITS>
struct CodePlaces {
  alignas(64) int32_t word[2][16];
  alignas(64) int32_t next[2][16];
  alignas(64) int32_t shift[2][16];
  alignas(64) int32_t next_shift[2][16];

  constexpr CodePlaces() : word(), next(), shift(), next_shift() {
    for (uint h = 0; h < 2; ++h)
      for (uint i = 0; i < 16; ++i) {
        const uint bit = (16 * h + i) * BITS;
        word[h][i] = int32_t(bit / 32);
        next[h][i] = int32_t(bit / 32 + 1 < BITS ? bit / 32 + 1 : BITS - 1);
        shift[h][i] = int32_t(bit % 32);
        next_shift[h][i] = int32_t(32 - bit % 32); // 32 shifts everything out
      }
  }
};
template <uint BITS>
constexpr CodePlaces<BITS> code_places{};

/// The codes of half a run, in the low bits of each element; above them there may be others.
template <uint BITS>
METAL_FUNC __m512i load_half_run(const uchar* run, uint h) {
  const CodePlaces<BITS>& places = code_places<BITS>;
  if constexpr (BITS == 8)
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run) + h));
  __m512i words;
  if constexpr (BITS == 4)
    words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run)));
  else
    words = _mm512_maskz_loadu_epi32(__mmask16((1u << BITS) - 1), run);
  const __m512i low = _mm512_permutexvar_epi32(_mm512_load_si512(places.word[h]), words);
  const __m512i codes = _mm512_srlv_epi32(low, _mm512_load_si512(places.shift[h]));
  if constexpr (32 % BITS == 0)
    return codes;
  const __m512i high = _mm512_permutexvar_epi32(_mm512_load_si512(places.next[h]), words);
  return _mm512_or_si512(codes, _mm512_sllv_epi32(high, _mm512_load_si512(places.next_shift[h])));
}

/// A permutation of 16 floats looks at the low four bits of whatever chooses: codes need not be cut out.
template <typename Run>
struct GroupWeights<Run, RunKind::Table> {
  const uchar* codes;
  const uchar* run;
  __m512 first;
  __m512 second;

  METAL_FUNC GroupWeights(const Run& group, const uchar* from) : codes(from) {
    alignas(64) float table[QUANTIZED_RUN];
    code_table(group, table);
    first = _mm512_load_ps(table);
    second = _mm512_load_ps(table + 16);
  }
  METAL_FUNC void read(uint index) { run = codes + index * (QUANTIZED_RUN * Run::BITS / 8); }
  METAL_FUNC DotVector at(uint i) const {
    const __m512i half_run = load_half_run<Run::BITS>(run, i / 16);
    return __builtin_bit_cast(Float16, _mm512_permutexvar_ps(half_run, i < 16 ? first : second));
  }
  METAL_FUNC DotVector finish(DotVector sum, DotVector) const { return sum; }
};

/// DOT_LANES codes of a run from element i on, as numbers.
template <uint BITS>
METAL_FUNC DotVector load_numbers(const uchar* run, uint i) {
  const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
  const __m512i codes = _mm512_and_si512(load_half_run<BITS>(run, i / 16), mask);
  return __builtin_bit_cast(Float16, _mm512_cvtepi32_ps(codes));
}

template <typename Run>
struct GroupWeights<Run, RunKind::Float8> {
  const uchar* codes;
  const uchar* run;
  __m512 scale;

  METAL_FUNC GroupWeights(const Run& group, const uchar* from) : codes(from), scale(_mm512_set1_ps(group.first)) {}
  METAL_FUNC void read(uint index) { run = codes + index * QUANTIZED_RUN; }
  METAL_FUNC DotVector at(uint i) const {
    const __m512i code = load_half_run<8>(run, i / 16);
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7F));
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi32(0x80));
    const __m512i bits = _mm512_or_si512(_mm512_slli_epi32(magnitude, 7), _mm512_slli_epi32(sign, 8));
    const __m512 value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F));
    const __m512 element = _mm512_mul_ps(value, _mm512_set1_ps(Run::UNIT));
    const __m512 safe = _mm512_mask_blend_ps(nan, element, _mm512_set1_ps(__builtin_nanf("")));
    return __builtin_bit_cast(Float16, _mm512_mul_ps(safe, scale));
  }
  METAL_FUNC DotVector finish(DotVector sum, DotVector) const { return sum; }
};

#else

using Int8 = int32_t __attribute__((vector_size(32)));

/// For 8 codes, number c of a run's four: the bytes at which the 32 bits begin that hold the first and the last four
/// of them (up to 4 bits: all of them), inside of the run, and where in those each code begins.
template <uint BITS>
struct CodePlaces {
  uint byte[4][2];
  alignas(32) uint32_t shift[4][8];

  constexpr CodePlaces() : byte(), shift() {
    for (uint c = 0; c < 4; ++c)
      for (uint i = 0; i < 8; ++i) {
        const uint half = BITS > 4 ? i / 4 : 0;
        const uint begin = (8 * c + 4 * half) * BITS / 8, last = 4 * BITS - 4;
        byte[c][half] = begin < last ? begin : last;
        shift[c][i] = (8 * c + i) * BITS - 8 * byte[c][half];
      }
  }
};
template <uint BITS>
constexpr CodePlaces<BITS> code_places{};

/// 8 codes of a run from element i on, in the low bits of each element; above them there may be others.
template <uint BITS>
METAL_FUNC Uint8 load_codes8(const uchar* run, uint i) {
  const CodePlaces<BITS>& places = code_places<BITS>;
  uint32_t low, high;
  __builtin_memcpy(&low, run + places.byte[i / 8][0], sizeof low);
  Uint8 shift;
  __builtin_memcpy(&shift, places.shift[i / 8], sizeof shift);
  if constexpr (BITS <= 4)
    return Uint8{low, low, low, low, low, low, low, low} >> shift;
  __builtin_memcpy(&high, run + places.byte[i / 8][1], sizeof high);
  return Uint8{low, low, low, low, high, high, high, high} >> shift;
}

template <uint BITS>
METAL_FUNC DotVector load_numbers(const uchar* run, uint i) {
  return __builtin_convertvector(__builtin_bit_cast(Int8, load_codes8<BITS>(run, i) & ((1u << BITS) - 1)), Float8);
}

#if defined(__AVX2__) && defined(__F16C__)

/// A permutation of 8 floats looks at the low three bits of whatever chooses, a blend at the sign.
template <typename Run>
struct GroupWeights<Run, RunKind::Table> {
  const uchar* codes;
  const uchar* run;
  alignas(32) float table[QUANTIZED_RUN];

  METAL_FUNC GroupWeights(const Run& group, const uchar* from) : codes(from) { code_table(group, table); }
  METAL_FUNC void read(uint index) { run = codes + index * (QUANTIZED_RUN * Run::BITS / 8); }
  METAL_FUNC DotVector at(uint i) const {
    const __m256i chosen = __builtin_bit_cast(__m256i, load_codes8<Run::BITS>(run, i));
    const float* half = table + i / 16 * 16;
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(half), chosen);
    if constexpr (Run::BITS < 4)
      return __builtin_bit_cast(Float8, low);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(half + 8), chosen);
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(chosen, 28));
    return __builtin_bit_cast(Float8, _mm256_blendv_ps(low, high, sign));
  }
  METAL_FUNC DotVector finish(DotVector sum, DotVector) const { return sum; }
};

template <typename Run>
struct GroupWeights<Run, RunKind::Float8> {
  const uchar* codes;
  const uchar* run;
  float unit;
  float scale;

  METAL_FUNC GroupWeights(const Run& group, const uchar* from) : codes(from), unit(Run::UNIT), scale(group.first) {}
  METAL_FUNC void read(uint index) { run = codes + index * QUANTIZED_RUN; }
  METAL_FUNC DotVector at(uint i) const {
    const __m128i code = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(run + i)));
    const __m128i magnitude = _mm_and_si128(code, _mm_set1_epi16(0x7F));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(code, _mm_set1_epi16(0x80)), 8);
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F)), _mm_set1_epi16(0x7E00));
    const __m128i bits = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), nan);
    return __builtin_bit_cast(Float8, _mm256_cvtph_ps(bits));
  }
  // The unit first: a large scale times it may overflow.
  METAL_FUNC DotVector finish(DotVector sum, DotVector) const { return sum * unit * scale; }
};

#endif
#endif

template <typename Run>
struct GroupWeights<Run, RunKind::Linear> {
  const uchar* codes;
  const uchar* run;
  float scale;
  float bias;

  METAL_FUNC GroupWeights(const Run& group, const uchar* from) : codes(from), scale(group.first), bias(group.second) {}
  METAL_FUNC void read(uint index) { run = codes + index * (QUANTIZED_RUN * Run::BITS / 8); }
  METAL_FUNC DotVector at(uint i) const { return load_numbers<Run::BITS>(run, i); }
  METAL_FUNC DotVector finish(DotVector sum, DotVector total) const { return sum * scale + total * bias; }
};

/// Rows that share a piece of x as fp32: what processors have registers for.
template <uint R, uint C>
constexpr uint QUANTIZED_BLOCK = C == 1 && R % 8 == 0 ? 8 : 4;

/// total[r][c] += row first_row + r of `w` . x[c], R rows, over runs begin .. end - 1.
template <typename Run, uint R, typename Rows, uint C, typename T>
METAL_FUNC void add_block(const Rows& w, uint first_row, const T* const (&x)[C], uint begin, uint end,
                          float (*total)[C]) {
  constexpr uint RUN_BYTES = Run::BITS * QUANTIZED_RUN / 8;
  const uchar* codes[R];
  for (uint r = 0; r < R; ++r)
    codes[r] = w.matrix.row_codes(w.row(first_row + r));
  // To the row that takes a row's place, see dot_whole_vectors.
  const ulong next = ulong(R) * w.matrix.codes_stride;
  DotVector acc[R][C] = {};
  const uint group_runs = 1u << w.matrix.group_shift;
  for (uint first = begin; first < end; first += group_runs) {
    // As fp32, and their sum, once for all rows.
    alignas(64) float xs[C][QUANTIZED_GROUP];
    DotVector sums[C] = {};
    const uint runs = end - first < group_runs ? end - first : group_runs;
    for (uint c = 0; c < C; ++c)
      for (uint i = 0; i < runs * QUANTIZED_RUN; i += DOT_LANES) {
        const DotVector v = dot_load(x[c] + first * QUANTIZED_RUN + i);
        __builtin_memcpy(xs[c] + i, &v, sizeof v);
        sums[c] += v;
      }
    for (uint r = 0; r < R; ++r) {
      const uchar* from = codes[r] + first * RUN_BYTES;
      __builtin_prefetch(from + next);
      Run group;
      group.load_scales(w.matrix, w.row(first_row + r), first);
      GroupWeights<Run> weights(group, from);
      DotVector part[C] = {};
      for (uint run = 0; run < runs; ++run) {
        weights.read(run);
        _Pragma("GCC unroll 4") for (uint i = 0; i < QUANTIZED_RUN; i += DOT_LANES) {
          const DotVector weight = weights.at(i);
          for (uint c = 0; c < C; ++c)
            part[c] += weight * dot_load(xs[c] + run * QUANTIZED_RUN + i);
        }
      }
      for (uint c = 0; c < C; ++c)
        acc[r][c] += weights.finish(part[c], sums[c]);
    }
  }
  for (uint r = 0; r < R; ++r)
    for (uint c = 0; c < C; ++c)
      total[r][c] += sum(acc[r][c]);
}

#ifdef METAL_SIM_INTEGER_DOT
/// Whether products are of integers: preparing x takes as long as several rows.
template <typename Run, uint R, uint C, typename T>
constexpr bool INTEGERS =
    uint(Run::FORMAT) == QUANTIZED_AFFINE && Run::BITS == 4 && sizeof(T) == 2 && R >= 32 && C == 1;

/// Scales or biases first .. first + count - 1, up to 8 of them, and zeros.
METAL_FUNC Float8 load_scales8(const uchar* from, uint type, uint first, uint count) {
  const uint size = type == QUANTIZED_FP32 ? 4 : 2;
  from += first * size;
  alignas(32) uchar some[32] = {};
  if (count < 8)
    from = static_cast<const uchar*>(__builtin_memcpy(some, from, count * size));
  if (type == QUANTIZED_FP32)
    return load8(reinterpret_cast<const float*>(from));
  return type == QUANTIZED_FP16 ? load8(reinterpret_cast<const half*>(from))
                                : load8(reinterpret_cast<const bfloat*>(from));
}

/// add_block for one row of x in integers, over whole groups, at most IntegerRow::CHUNK_RUNS runs. False, and nothing
/// done, where x has to be multiplied as it is.
template <typename Run, uint R, typename Rows, typename T>
METAL_FUNC bool add_integers(const Rows& w, const T* x, uint begin, uint end, float (&total)[R][1]) {
  constexpr uint RUN_BYTES = Run::BITS * QUANTIZED_RUN / 8;
  const uint shift = w.matrix.group_shift, group_runs = 1u << shift, runs = end - begin;
  const uint first_group = begin >> shift, groups = runs >> shift;
  // To a row as far ahead as memory takes to answer: a chunk, which is the next row's where this one has all of it.
  const ulong next = IntegerRow::CHUNK_RUNS / runs * ulong(w.matrix.codes_stride);
  IntegerRow prepared;
  if (!prepared.prepare(x + begin * QUANTIZED_RUN, runs, group_runs))
    return false;
  for (uint r = 0; r < R; ++r) {
    const uint row = w.row(r);
    alignas(32) float scale[IntegerRow::CHUNK_RUNS];
    Float8 acc = {};
    for (uint first = 0; first < groups; first += 8) {
      const uint count = groups - first < 8 ? groups - first : 8;
      const auto load = [&](const uchar* from) {
        return load_scales8(from, w.matrix.scale_type, first_group + first, count);
      };
      const Float8 worth = load(w.matrix.row_scales(row)) * load8(prepared.unit + first);
      __builtin_memcpy(scale + first, &worth, sizeof worth);
      acc += load(w.matrix.row_biases(row)) * load8(prepared.total + first);
    }
    const uchar* codes = w.matrix.row_codes(row) + begin * RUN_BYTES;
    if (shift == 0)
      add_integer_row<1>(codes, runs, next, prepared, scale, acc);
    else if (shift == 1)
      add_integer_row<2>(codes, runs, next, prepared, scale, acc);
    else
      add_integer_row<4>(codes, runs, next, prepared, scale, acc);
    total[r][0] += sum(acc);
  }
  return true;
}
#endif

/// total[r][c] = row r of `w` . x[c] over runs begin .. end - 1, whole groups. `w`: R rows, as
/// moe/gemv_quantized.h has them.
template <typename Run, typename Rows, uint R, uint C, typename T>
METAL_FUNC void dot_quantized(const Rows& w, const T* const (&x)[C], uint begin, uint end, float (&total)[R][C]) {
  for (auto& row : total)
    for (float& sum : row)
      sum = 0.0f;
#ifdef METAL_SIM_INTEGER_DOT
  if constexpr (INTEGERS<Run, R, C, T>) {
    const auto chunk_end = [&] { return end - begin < IntegerRow::CHUNK_RUNS ? end : begin + IntegerRow::CHUNK_RUNS; };
    while (begin < end && add_integers<Run>(w, x[0], begin, chunk_end(), total))
      begin = chunk_end();
    if (begin == end)
      return;
  }
#endif
  constexpr uint BLOCK = QUANTIZED_BLOCK<R, C>;
  static_assert(R % BLOCK == 0);
  for (uint r = 0; r < R; r += BLOCK)
    add_block<Run, BLOCK>(w, r, x, begin, end, total + r);
}

} // namespace metal_sim
