// simdgroup_matrix where a simdgroup is one thread: all 64 elements in the processor's vectors.
//
// Two representations. `FloatMatrix` keeps elements as fp32 whatever T is (exact for fp16 and bf16; results of type
// half are rounded after each multiply_accumulate). Where the processor has BF16 dot products, bf16 operands stay as
// they are in memory: eight rows of eight elements and whether the load was transposed, because rows of A and columns
// of B are pairs along K in memory already, which is what those instructions take. A matrix loaded transposed from
// weights W[n, k] is thus never transposed at all.
#pragma once
#include "native_vector.h"

namespace metal_sim {

/// 8x8 fp32 in vectors of two rows.
struct FloatMatrix {
  Float16 pair[4];

  METAL_FUNC Float8 row(int i) const { return i % 2 ? high(pair[i / 2]) : low(pair[i / 2]); }
  METAL_FUNC static FloatMatrix of_rows(const Float8 (&rows)[8]) {
    return {{join(rows[0], rows[1]), join(rows[2], rows[3]), join(rows[4], rows[5]), join(rows[6], rows[7])}};
  }
};

/// Rows become columns: three rounds of exchanging elements 1, 2 and 4 apart.
METAL_FUNC void transpose(Float8 (&r)[8]) {
  Float8 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = i; j < i + 2; ++j) {
      u[j] = __builtin_shufflevector(t[j], t[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[j + 2] = __builtin_shufflevector(t[j], t[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <typename T>
METAL_FUNC FloatMatrix load_float_matrix(const T* from, unsigned long stride, bool transposed) {
  Float8 rows[8];
  for (int i = 0; i < 8; ++i)
    rows[i] = load8(from + i * stride);
  if (transposed)
    transpose(rows);
  return FloatMatrix::of_rows(rows);
}

/// c + a b in fp32: for each k, a column of a times a row of b, two rows of c at a time.
template <int K = 0>
METAL_FUNC void multiply_accumulate(Float16 (&c)[4], const FloatMatrix& a, const FloatMatrix& b) {
  if constexpr (K < 8) {
    const Float8 b_row = b.row(K);
    const Float16 b_rows = join(b_row, b_row);
    for (int i = 0; i < 4; ++i)
      c[i] += __builtin_shufflevector(a.pair[i], a.pair[i], K, K, K, K, K, K, K, K, 8 + K, 8 + K, 8 + K, 8 + K, 8 + K,
                                      8 + K, 8 + K, 8 + K) *
              b_rows;
    multiply_accumulate<K + 1>(c, a, b);
  }
}

#if defined(__AVX512BF16__)
#define METAL_SIM_BF16_MATRIX 1

/// 8x8 bf16 as it was loaded: rows 0..3 and 4..7 of memory.
struct Bf16Matrix {
  __m512i half_matrix[2];
  bool transposed;

  METAL_FUNC static Bf16Matrix load(const bfloat* from, unsigned long stride, bool transposed) {
    Bf16Matrix m;
    for (int i = 0; i < 2; ++i) {
      const bfloat* rows = from + 4 * i * stride;
      __m512i v = _mm512_castsi128_si512(load_row(rows));
      v = _mm512_inserti32x4(v, load_row(rows + stride), 1);
      v = _mm512_inserti32x4(v, load_row(rows + 2 * stride), 2);
      m.half_matrix[i] = _mm512_inserti32x4(v, load_row(rows + 3 * stride), 3);
    }
    m.transposed = transposed;
    return m;
  }
  METAL_FUNC static __m128i load_row(const bfloat* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  METAL_FUNC FloatMatrix to_float() const {
    bfloat elements[64];
    __builtin_memcpy(elements, half_matrix, sizeof elements);
    return load_float_matrix(elements, 8, transposed);
  }
};

/// c + a b, where a was loaded as it is and b transposed: for each pair p along K, c[m][n] += a[m][p] . b[n][p].
METAL_FUNC void multiply_accumulate(Float16 (&c)[4], const Bf16Matrix& a, const Bf16Matrix& b) {
  for (int p = 0; p < 4; ++p) {
    // Pair p of each of the 8 columns n, twice: one half for each of two rows of c.
    const __m512i columns = _mm512_setr_epi32(p, 4 + p, 8 + p, 12 + p, 16 + p, 20 + p, 24 + p, 28 + p, //
                                              p, 4 + p, 8 + p, 12 + p, 16 + p, 20 + p, 24 + p, 28 + p);
    const __m512i bs = _mm512_permutex2var_epi32(b.half_matrix[0], columns, b.half_matrix[1]);
    for (int i = 0; i < 4; ++i) {
      const int first = 8 * (i % 2) + p, second = first + 4; // pair p of rows 2i and 2i + 1
      const __m512i rows = _mm512_setr_epi32(first, first, first, first, first, first, first, first, //
                                             second, second, second, second, second, second, second, second);
      const __m512i as = _mm512_permutexvar_epi32(rows, a.half_matrix[i / 2]);
      c[i] = __builtin_bit_cast(Float16,
                                _mm512_dpbf16_ps(__builtin_bit_cast(__m512, c[i]), __builtin_bit_cast(__m512bh, as),
                                                 __builtin_bit_cast(__m512bh, bs)));
    }
  }
}
#endif

/// One element of a matrix, to read and write.
template <typename T>
struct MatrixElement {
  float* value;

  METAL_FUNC operator T() const { return T(*value); }
  METAL_FUNC MatrixElement& operator=(T v) {
    *value = float(v);
    return *this;
  }
  METAL_FUNC MatrixElement& operator=(const MatrixElement& other) { return *this = T(other); }
  METAL_FUNC MatrixElement& operator+=(float v) { return *this = T(*value + v); }
};

} // namespace metal_sim

namespace metal {

template <typename T, int Rows, int Columns>
struct simdgroup_matrix;

template <typename T>
struct simdgroup_matrix<T, 8, 8> {
  metal_sim::FloatMatrix values;

  struct Elements {
    float* first;
    METAL_FUNC metal_sim::MatrixElement<T> operator[](int i) const { return {first + i}; }
  };
  /// All 64, row by row.
  METAL_FUNC Elements thread_elements() { return {reinterpret_cast<float*>(&values)}; }

  METAL_FUNC const metal_sim::FloatMatrix& to_float() const { return values; }
  METAL_FUNC void set(const metal_sim::FloatMatrix& from) { values = from; }
  METAL_FUNC void load(const T* from, unsigned long stride, bool transposed) {
    values = metal_sim::load_float_matrix(from, stride, transposed);
  }
};

#ifdef METAL_SIM_BF16_MATRIX
template <>
struct simdgroup_matrix<bfloat, 8, 8> {
  metal_sim::Bf16Matrix values;

  METAL_FUNC metal_sim::FloatMatrix to_float() const { return values.to_float(); }
  METAL_FUNC void set(const metal_sim::FloatMatrix& from) {
    float elements[64];
    bfloat rounded[64];
    __builtin_memcpy(elements, &from, sizeof elements);
    for (int i = 0; i < 64; ++i)
      rounded[i] = bfloat(elements[i]);
    load(rounded, 8, false);
  }
  METAL_FUNC void load(const bfloat* from, unsigned long stride, bool transposed) {
    values = metal_sim::Bf16Matrix::load(from, stride, transposed);
  }
};
#endif

template <typename T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  metal_sim::FloatMatrix filled;
  for (auto& pair : filled.pair)
    pair = metal_sim::Float16{} + float(value);
  simdgroup_matrix<T, Rows, Columns> matrix;
  matrix.set(filled);
  return matrix;
}

template <typename T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_diagonal_simdgroup_matrix(T value) {
  float elements[64] = {};
  for (int i = 0; i < 8; ++i)
    elements[9 * i] = float(value);
  metal_sim::FloatMatrix diagonal;
  __builtin_memcpy(&diagonal, elements, sizeof elements);
  simdgroup_matrix<T, Rows, Columns> matrix;
  matrix.set(diagonal);
  return matrix;
}

template <typename T>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* from, ulong elements_per_row = 8,
                               ulong2 origin = ulong2(0, 0), bool transpose_matrix = false) {
  matrix.load(from + origin.y * elements_per_row + origin.x, elements_per_row, transpose_matrix);
}

template <typename T>
METAL_FUNC void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, T* to, ulong elements_per_row = 8,
                                ulong2 origin = ulong2(0, 0), bool transpose_matrix = false) {
  const metal_sim::FloatMatrix values = matrix.to_float();
  metal_sim::Float8 rows[8];
  for (int i = 0; i < 8; ++i)
    rows[i] = values.row(i);
  if (transpose_matrix)
    metal_sim::transpose(rows);
  to += origin.y * elements_per_row + origin.x;
  for (int i = 0; i < 8; ++i) {
    if constexpr (is_same_v<T, float>)
      __builtin_memcpy(to + i * elements_per_row, &rows[i], sizeof rows[i]);
    else
      for (int j = 0; j < 8; ++j)
        to[i * elements_per_row + j] = T(rows[i][j]);
  }
}

template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  metal_sim::FloatMatrix sum = c.to_float();
#ifdef METAL_SIM_BF16_MATRIX
  if constexpr (is_same_v<A, bfloat> && is_same_v<B, bfloat>) {
    // Known at compile time once the loads are inlined.
    if (!a.values.transposed && b.values.transposed)
      metal_sim::multiply_accumulate(sum.pair, a.values, b.values);
    else
      metal_sim::multiply_accumulate(sum.pair, a.to_float(), b.to_float());
  } else
#endif
    metal_sim::multiply_accumulate(sum.pair, a.to_float(), b.to_float());
  if constexpr (is_same_v<D, half>)
    for (auto& pair : sum.pair)
      pair = metal_sim::join(metal_sim::round_to_half(metal_sim::low(pair)),
                             metal_sim::round_to_half(metal_sim::high(pair)));
  d.set(sum);
}

template <typename D, typename A, typename B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}

} // namespace metal
