// simdgroup_matrix: d = a b + c for 8x8 matrices in device or threadgroup memory, operands of one type and sums of
// another, with transposed loads, origins and row strides.
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

struct MatrixArgs {
  uint stride;
  uint origin_row, origin_column;
  uint transpose_b;
  uint transpose_d;
};

template <typename T, typename Acc>
[[kernel]] void matrix(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]],
                       device const Acc* c [[buffer(2)]], device Acc* d [[buffer(3)]],
                       constant MatrixArgs& args [[buffer(4)]], threadgroup T* shared [[threadgroup(0)]],
                       uint lane [[thread_index_in_simdgroup]]) {
  const ulong2 origin = ulong2(args.origin_column, args.origin_row);
  simdgroup_matrix<T, 8, 8> ma, mb;
  simdgroup_matrix<Acc, 8, 8> mc;
  simdgroup_load(ma, a, args.stride, origin);
  for (uint i = lane; i < 64; i += SIMD_WIDTH)
    shared[i] = b[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (args.transpose_b)
    simdgroup_load(mb, shared, 8, ulong2(0, 0), true);
  else
    simdgroup_load(mb, shared);
  simdgroup_load(mc, c, args.stride, origin);
  simdgroup_multiply_accumulate(mc, ma, mb, mc);
  if (args.transpose_d)
    simdgroup_store(mc, d, args.stride, origin, true);
  else
    simdgroup_store(mc, d, args.stride, origin);
}

#define MATRIX(name, T, Acc) template [[host_name("matrix_" #name)]] [[kernel]] decltype(matrix<T, Acc>) matrix<T, Acc>;
MATRIX(fp32, float, float)
MATRIX(fp16, half, half)
MATRIX(fp16_fp32, half, float)
MATRIX(bf16_fp32, bfloat, float)

/// A filled matrix, scaled element by element, and its product with a diagonal one.
kernel void matrix_elements(device float* out [[buffer(0)]]) {
  simdgroup_float8x8 filled = make_filled_simdgroup_matrix<float, 8, 8>(3.0f);
  for (uint i = 0; i < 64 / SIMD_WIDTH; ++i)
    filled.thread_elements()[i] = filled.thread_elements()[i] * 0.5f;
  const simdgroup_float8x8 diagonal = make_diagonal_simdgroup_matrix<float, 8, 8>(2.0f);
  simdgroup_float8x8 product;
  simdgroup_multiply(product, filled, diagonal);
  simdgroup_store(filled, out, 8);
  simdgroup_store(product, out + 64, 8);
  simdgroup_store(diagonal, out + 128, 8);
}
