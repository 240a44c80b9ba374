// simdgroup_matrix on NVIDIA GPUs: products of half and bfloat on tensor cores, all others with exact fp32
// multiply-adds.
//
// Lane l holds elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1): row-major fragments of `mma` for the left factor
// and the sum. Its right factor is column-major: movmatrix transposes it there. m16n8k8, the smallest shape of 16-bit
// types, has 16 rows: the lower 8 are zeros and their sums dropped.
#pragma once

#include "simdgroup.h"

namespace metal_sim {

/// Where a lane's elements stand in an 8x8 matrix: (row, column) and (row, column + 1).
struct MatrixPlace {
  uint row, column;

  METAL_FUNC static MatrixPlace of(uint lane) { return {lane / 4, lane % 4 * 2}; }
  /// The lane that has an element; which of its two it is: the lowest bit of the column.
  METAL_FUNC static uint lane(uint row, uint column) { return row * 4 + column / 2; }
};

/// sum += a b for this lane's two elements of the sum, along k in fp32.
template <typename A, typename B>
METAL_FUNC void multiply_add_lanes(const metal::vec<A, 2>& a, const metal::vec<B, 2>& b, float (&sum)[2]) {
  const MatrixPlace place = MatrixPlace::of(cuda_lane());
  const float a0 = float(a.x), a1 = float(a.y), b0 = float(b.x), b1 = float(b.y);
#pragma unroll
  for (uint k = 0; k < 8; ++k) {
    const float left = read_lane(k % 2 == 0 ? a0 : a1, MatrixPlace::lane(place.row, k));
    const uint right = MatrixPlace::lane(k, place.column);
    sum[0] = ::fmaf(left, read_lane(b0, right), sum[0]);
    sum[1] = ::fmaf(left, read_lane(b1, right), sum[1]);
  }
}

METAL_FUNC uint32_t transposed(uint32_t fragment) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
  return result;
}

#define METAL_SIM_MMA(TYPE, NAME)                                                                                      \
  METAL_FUNC void multiply_add_lanes(const metal::vec<TYPE, 2>& a, const metal::vec<TYPE, 2>& b, float (&sum)[2]) {    \
    const uint32_t left = __builtin_bit_cast(uint32_t, a), right = transposed(__builtin_bit_cast(uint32_t, b));        \
    float unused0 = 0.0f, unused1 = 0.0f;                                                                              \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "       \
                 "{%0, %1, %2, %3};"                                                                                   \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(unused0), "+f"(unused1)                                            \
                 : "r"(left), "r"(0u), "r"(right));                                                                    \
  }
METAL_SIM_MMA(half, "f16")
METAL_SIM_MMA(bfloat, "bf16")
#undef METAL_SIM_MMA

} // namespace metal_sim

namespace metal {

template <typename T, int Rows, int Columns>
struct simdgroup_matrix;

template <typename T>
struct simdgroup_matrix<T, 8, 8> {
  simdgroup_matrix() = default;
  METAL_FUNC explicit simdgroup_matrix(T diagonal) {
    const metal_sim::MatrixPlace place = metal_sim::MatrixPlace::of(metal_sim::cuda_lane());
    elements_.x = place.row == place.column ? diagonal : T(0.0f);
    elements_.y = place.row == place.column + 1 ? diagonal : T(0.0f);
  }

  METAL_FUNC vec<T, 2>& thread_elements() { return elements_; }
  METAL_FUNC const vec<T, 2>& thread_elements() const { return elements_; }

private:
  vec<T, 2> elements_;
};

template <typename T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(metal_sim::Same<T> value) {
  simdgroup_matrix<T, Rows, Columns> matrix;
  matrix.thread_elements().x = value;
  matrix.thread_elements().y = value;
  return matrix;
}
template <typename T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_diagonal_simdgroup_matrix(metal_sim::Same<T> value) {
  return simdgroup_matrix<T, Rows, Columns>(value);
}

template <typename T>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* from, ulong elements_per_row = 8,
                               ulong2 origin = ulong2(0, 0), bool transpose_matrix = false) {
  const metal_sim::MatrixPlace place = metal_sim::MatrixPlace::of(metal_sim::cuda_lane());
  from += origin.y * elements_per_row + origin.x;
  const ulong first =
      transpose_matrix ? place.column * elements_per_row + place.row : place.row * elements_per_row + place.column;
  matrix.thread_elements().x = from[first];
  matrix.thread_elements().y = from[first + (transpose_matrix ? elements_per_row : 1)];
}

template <typename T>
METAL_FUNC void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, T* to, ulong elements_per_row = 8,
                                ulong2 origin = ulong2(0, 0), bool transpose_matrix = false) {
  const metal_sim::MatrixPlace place = metal_sim::MatrixPlace::of(metal_sim::cuda_lane());
  to += origin.y * elements_per_row + origin.x;
  const ulong first =
      transpose_matrix ? place.column * elements_per_row + place.row : place.row * elements_per_row + place.column;
  to[first] = matrix.thread_elements().x;
  to[first + (transpose_matrix ? elements_per_row : 1)] = matrix.thread_elements().y;
}

template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  float sum[2] = {float(c.thread_elements().x), float(c.thread_elements().y)};
  metal_sim::multiply_add_lanes(a.thread_elements(), b.thread_elements(), sum);
  d.thread_elements().x = D(sum[0]);
  d.thread_elements().y = D(sum[1]);
}

template <typename D, typename A, typename B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}

} // namespace metal
