// What kernels/tiles reaches of an NVIDIA GPU beyond Metal's own words: copies to shared memory that run beside
// arithmetic, and tiles of sums on tensor cores in their own fragments (ldmatrix, mma m16n8k16).
#pragma once

#include "cuda_matrix.h"

namespace metal_sim {

#if __CUDA_ARCH__ >= 800

METAL_FUNC uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

/// 16 bytes past the registers and the L1 cache; zeros where not `inside`. 256 bytes of the row are fetched to L2.
METAL_FUNC void copy_async(void* to, const void* from, bool inside) {
  const uint32_t bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
METAL_FUNC void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <uint PENDING>
METAL_FUNC void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

template <typename T>
inline constexpr bool has_tensor_tile = sizeof(T) == 2;

/// Two or four 8x8 matrices of 16-bit elements from shared memory: lanes 8i..8i+7 give the rows of matrix i.
METAL_FUNC void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
METAL_FUNC void load_matrices(uint32_t (&to)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(address)
               : "memory");
}

#define METAL_SIM_MMA(TYPE, NAME)                                                                                      \
  METAL_FUNC void multiply_add_fragments(TYPE, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "    \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                                         \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                      \
  }
METAL_SIM_MMA(half, "f16")
METAL_SIM_MMA(bfloat, "bf16")
#undef METAL_SIM_MMA

/// sum += the fp16 sum of 16 products.
METAL_FUNC void multiply_add_fp16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t low, high;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %8};"
               : "=r"(low), "=r"(high)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0u));
  const auto add = [](float& to, uint32_t word) { to += float(__builtin_bit_cast(half, uint16_t(word))); };
  add(sum[0], low);
  add(sum[1], low >> 16);
  add(sum[2], high);
  add(sum[3], high >> 16);
}

/// SimdgroupTile of tiles/simdgroup_tile.h with 16-bit elements, staged: fragments of 16 rows, 8 columns, 16 of K. A
/// tile of 8 rows leaves the lower half of its fragments zero.
template <typename T, bool FP16_ACCUMULATION, uint MATRICES, uint ROWS, uint COLUMNS>
struct TensorTile {
  static constexpr uint ROW_FRAGMENTS = (ROWS + 15) / 16;
  static constexpr uint COLUMN_FRAGMENTS = COLUMNS / 8;
  float sum[MATRICES][ROW_FRAGMENTS][COLUMN_FRAGMENTS][4];

  METAL_FUNC void clear() {
#pragma unroll
    for (uint m = 0; m < MATRICES; ++m)
#pragma unroll
      for (uint i = 0; i < ROW_FRAGMENTS; ++i)
#pragma unroll
        for (uint j = 0; j < COLUMN_FRAGMENTS; ++j)
#pragma unroll
          for (uint e = 0; e < 4; ++e)
            sum[m][i][j][e] = 0.0f;
  }

  template <uint K, uint LD, typename Weights>
  METAL_FUNC void multiply_add(const T* rows, const Weights& weights) {
    const uint lane = cuda_lane();
    // 8x8 matrices of a: rows 0-7, rows 8-15, then both 8 further along K; of b: columns 0-7 at 0 and 8 of K, columns
    // 8-15 likewise.
    const uint a_row = ROWS == 8 ? lane % 8 : lane % 16, a_k = ROWS == 8 ? lane / 8 % 2 * 8 : lane / 16 * 8;
    const uint32_t a_first = shared_address(rows + a_row * LD + a_k);
    uint32_t b_first[MATRICES];
#pragma unroll
    for (uint m = 0; m < MATRICES; ++m)
      b_first[m] = shared_address(weights.at(m, lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 8);
    const auto offset = [](uint row, uint k) { return uint32_t((row * LD + k) * sizeof(T)); };
#pragma unroll
    for (uint k = 0; k < K; k += 16) {
      uint32_t a[ROW_FRAGMENTS][4];
#pragma unroll
      for (uint i = 0; i < ROW_FRAGMENTS; ++i)
        if constexpr (ROWS == 8) {
          uint32_t upper[2];
          load_matrices(upper, a_first + offset(0, k));
          a[i][0] = upper[0], a[i][1] = 0, a[i][2] = upper[1], a[i][3] = 0;
        } else {
          load_matrices(a[i], a_first + offset(16 * i, k));
        }
#pragma unroll
      for (uint m = 0; m < MATRICES; ++m)
#pragma unroll
        for (uint j = 0; j < COLUMN_FRAGMENTS; j += 2) {
          uint32_t b[4] = {};
          if constexpr (COLUMN_FRAGMENTS == 1) {
            uint32_t one[2];
            load_matrices(one, b_first[m] + offset(0, k));
            b[0] = one[0], b[1] = one[1];
          } else {
            load_matrices(b, b_first[m] + offset(8 * j, k));
          }
#pragma unroll
          for (uint i = 0; i < ROW_FRAGMENTS; ++i)
#pragma unroll
            for (uint half_pair = 0; half_pair < (COLUMN_FRAGMENTS == 1 ? 1 : 2); ++half_pair) {
              float (&to)[4] = sum[m][i][j + half_pair];
              if constexpr (FP16_ACCUMULATION)
                multiply_add_fp16(to, a[i], b[2 * half_pair], b[2 * half_pair + 1]);
              else
                multiply_add_fragments(T{}, to, a[i], b[2 * half_pair], b[2 * half_pair + 1]);
            }
        }
    }
  }

  template <typename Visit>
  METAL_FUNC void for_each_pair(const Visit& visit, float*, uint lane) const {
#pragma unroll
    for (uint i = 0; i < ROW_FRAGMENTS; ++i)
#pragma unroll
      for (uint lower = 0; lower < (ROWS == 8 ? 1 : 2); ++lower)
#pragma unroll
        for (uint j = 0; j < COLUMN_FRAGMENTS; ++j) {
          float sums[MATRICES][2];
#pragma unroll
          for (uint m = 0; m < MATRICES; ++m) {
            sums[m][0] = sum[m][i][j][2 * lower];
            sums[m][1] = sum[m][i][j][2 * lower + 1];
          }
          visit(16 * i + 8 * lower + lane / 4, 8 * j + lane % 4 * 2, sums);
        }
  }
};

#else

METAL_FUNC void copy_async(void* to, const void* from, bool inside) {
  *static_cast<uint4*>(to) = inside ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}
METAL_FUNC void copy_commit() {}
template <uint PENDING>
METAL_FUNC void copy_wait() {}

template <typename T>
inline constexpr bool has_tensor_tile = false;
template <typename T, bool FP16_ACCUMULATION, uint MATRICES, uint ROWS, uint COLUMNS>
struct TensorTile;

#endif

} // namespace metal_sim
