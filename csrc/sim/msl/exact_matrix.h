// simdgroup_matrix where a simdgroup has 32 lanes: two neighbouring elements of a row per lane, placed as on Apple's
// GPUs. A product exchanges all elements; sums go along k in fp32 and are rounded to the result's type at the end.
#pragma once

#include "exact_services.h"
#include "vector.h"

namespace metal_sim {

/// Where a lane's elements stand in an 8x8 matrix: (row, column) and (row, column + 1).
struct MatrixPlace {
  uint row, column;

  METAL_FUNC static MatrixPlace of(uint lane) {
    return {((lane >> 4) << 2) + ((lane >> 1) & 3), (((lane >> 3) & 1) << 2) + ((lane & 1) << 1)};
  }
  /// The lane that has an element, and which of its two it is.
  METAL_FUNC static uint lane(uint row, uint column) {
    return ((row >> 2) << 4) | ((column >> 2) << 3) | ((row & 3) << 1) | ((column >> 1) & 1);
  }
  METAL_FUNC static uint element(uint column) { return column & 1; }
};
static_assert(SIMD_WIDTH == 32, "8x8 elements, two per lane");

/// One lane's elements of both factors.
struct FactorElements {
  float a[2], b[2];
};

/// d = a b + c for this lane's two elements.
METAL_SIM_UNCHECKED inline void multiply_accumulate_elements(const FactorElements& own, float (&sum)[2]) {
  FactorElements all[SIMD_WIDTH];
  exact_exchange("simdgroup_multiply_accumulate", &own, sizeof own, all);
  const MatrixPlace place = MatrixPlace::of(exact_lane());
  for (uint k = 0; k < 8; ++k) {
    const float a = all[MatrixPlace::lane(place.row, k)].a[MatrixPlace::element(k)];
    const FactorElements& b = all[MatrixPlace::lane(k, place.column)];
    sum[0] += a * b.b[0];
    sum[1] += a * b.b[1];
  }
}

} // namespace metal_sim

namespace metal {

template <typename T, int Rows, int Columns>
struct simdgroup_matrix;

template <typename T>
struct simdgroup_matrix<T, 8, 8> {
  simdgroup_matrix() = default;
  METAL_FUNC explicit simdgroup_matrix(T diagonal) {
    const metal_sim::MatrixPlace place = metal_sim::MatrixPlace::of(metal_sim::exact_lane());
    for (uint i = 0; i < 2; ++i)
      elements_[int(i)] = place.row == place.column + i ? diagonal : T(0.0f);
  }

  METAL_FUNC vec<T, 2>& thread_elements() { return elements_; }
  METAL_FUNC const vec<T, 2>& thread_elements() const { return elements_; }

private:
  vec<T, 2> elements_;
};

template <typename T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(metal_sim::Same<T> value) {
  simdgroup_matrix<T, Rows, Columns> matrix;
  matrix.thread_elements() = vec<T, 2>(value);
  return matrix;
}
template <typename T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_diagonal_simdgroup_matrix(metal_sim::Same<T> value) {
  return simdgroup_matrix<T, Rows, Columns>(value);
}

template <typename T>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* from, ulong elements_per_row = 8,
                               ulong2 origin = ulong2(0, 0), bool transpose_matrix = false) {
  const metal_sim::MatrixPlace place = metal_sim::MatrixPlace::of(metal_sim::exact_lane());
  from += origin.y * elements_per_row + origin.x;
  for (uint i = 0; i < 2; ++i) {
    const uint row = transpose_matrix ? place.column + i : place.row;
    const uint column = transpose_matrix ? place.row : place.column + i;
    matrix.thread_elements()[int(i)] = from[row * elements_per_row + column];
  }
}

template <typename T>
METAL_FUNC void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, T* to, ulong elements_per_row = 8,
                                ulong2 origin = ulong2(0, 0), bool transpose_matrix = false) {
  const metal_sim::MatrixPlace place = metal_sim::MatrixPlace::of(metal_sim::exact_lane());
  to += origin.y * elements_per_row + origin.x;
  for (uint i = 0; i < 2; ++i) {
    const uint row = transpose_matrix ? place.column + i : place.row;
    const uint column = transpose_matrix ? place.row : place.column + i;
    to[row * elements_per_row + column] = matrix.thread_elements()[int(i)];
  }
}

template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  metal_sim::FactorElements own;
  float sum[2];
  for (int i = 0; i < 2; ++i) {
    own.a[i] = float(a.thread_elements()[i]);
    own.b[i] = float(b.thread_elements()[i]);
    sum[i] = float(c.thread_elements()[i]);
  }
  metal_sim::multiply_accumulate_elements(own, sum);
  d.thread_elements() = vec<D, 2>(sum[0], sum[1]);
}

template <typename D, typename A, typename B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}

} // namespace metal
