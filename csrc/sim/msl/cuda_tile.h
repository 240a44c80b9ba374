// What kernels/tiles reaches of an NVIDIA GPU beyond Metal's own words: copies to shared memory that run beside
// arithmetic, and tiles of sums on tensor cores in their own fragments. Compute capability 8.0 or later.
//
// Staged rows are 128 bytes in eight pieces of 16, piece p of row r in place p ^ r % 8: eight rows' same pieces then
// lie in different banks (ldmatrix), and so lays the warpgroup instructions of Hopper GPUs want them.
#pragma once

#include "cuda_matrix.h"

namespace metal_sim {

METAL_FUNC uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

/// 16 bytes past the registers and the L1 cache; zeros where not `inside`. 256 bytes of the row are fetched to L2.
METAL_FUNC void copy_async(void* to, const void* from, bool inside) {
  const uint32_t bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
/// 16 bytes as above where `wanted`, else nothing. TO, FROM: bytes added to the addresses.
template <uint TO, uint FROM>
METAL_FUNC void copy_async_at(void* to, const void* from, bool wanted) {
  asm volatile("{.reg .pred p;\n\t"
               "setp.ne.u32 p, %2, 0;\n\t"
               "@p cp.async.cg.shared.global.L2::256B [%0 + %3], [%1 + %4], 16;}" ::"r"(shared_address(to)),
               "l"(from), "r"(uint32_t(wanted)), "n"(TO), "n"(FROM)
               : "memory");
}
METAL_FUNC void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <uint PENDING>
METAL_FUNC void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // warpgroup instructions read what was written here
#endif
}

/// Up to BYTES bytes, of which `count` are there; the rest are zeros. Both addresses multiples of BYTES.
template <uint BYTES>
METAL_FUNC void copy_async_part(void* to, const void* from, uint count) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
               "r"(count)
               : "memory");
}
/// copy_wait for what is read with ordinary loads, by the same warp or behind a barrier.
template <uint PENDING>
METAL_FUNC void copy_wait_own() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

template <typename T>
struct SwizzledRows {
  static constexpr uint ROW_BYTES = 128, ELEMENTS = ROW_BYTES / sizeof(T), PIECE = 16 / sizeof(T);

  METAL_FUNC static constexpr uint at(uint row, uint k) { return row * ELEMENTS + (k / PIECE ^ row % 8) * PIECE; }
};

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

// sum = a b.
#define METAL_SIM_FIRST_MMA(TYPE, NAME)                                                                                \
  METAL_FUNC void multiply_fragments(TYPE, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "    \
                 "{%8, %9}, {%10, %10, %10, %10};"                                                                     \
                 : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));                           \
  }
METAL_SIM_FIRST_MMA(half, "f16")
METAL_SIM_FIRST_MMA(bfloat, "bf16")
#undef METAL_SIM_FIRST_MMA

/// sum += a (b + c) in tf32, four of K: lane (g, t) holds of the first factor rows g and g + 8 at t, of the second
/// factors column g.
METAL_FUNC void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[2], uint32_t b, uint32_t c) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %4, %5}, {%6, %7}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(b), "r"(c));
}

/// The products of two pairs.
METAL_FUNC uint32_t multiply_bfloats(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u)); // -0
  return product;
}

/// sum = base + a b, bytes of a without signs and of b with them: 16 rows, 32 columns of a, 8 columns of b.
METAL_FUNC void multiply_signed_bytes(uint32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                      uint32_t base) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%10, %10, %10, %10};"
               : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(base));
}
/// sum += a b.
METAL_FUNC void multiply_add_signed_bytes(uint32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Barrier `index` of `threads` threads, whole warps.
METAL_FUNC void barrier_of(uint32_t index, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(threads) : "memory");
}

/// `value`, of which the compiler no longer knows where it comes from.
METAL_FUNC uint32_t unknown(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// a & b | c, one instruction whatever the compiler knows of b.
METAL_FUNC uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

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

/// One warp's part of a tile, in fragments of 16 rows, 8 columns and 16 of K. A part of 8 rows leaves the lower half of
/// its fragments zero.
template <typename T, bool FP16_ACCUMULATION, uint MATRICES, uint ROWS, uint COLUMNS>
struct WarpTile {
  static constexpr uint ROW_FRAGMENTS = (ROWS + 15) / 16, COLUMN_FRAGMENTS = COLUMNS / 8;
  static constexpr uint K = SwizzledRows<T>::ELEMENTS;
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

  /// `rows`, `weights`: staged rows whose number is a multiple of 8.
  METAL_FUNC void multiply_add(const T* rows, const T* weights, uint matrix_step) {
    constexpr uint ROW_BYTES = SwizzledRows<T>::ROW_BYTES;
    const uint lane = cuda_lane();
    // Lane's row in 8x8 matrices of a: rows 0-7, rows 8-15, then both 8 further along K; of b: columns 0-7 at 0 and 8
    // of K, columns 8-15 likewise.
    const uint a_row = ROWS == 8 ? lane % 8 : lane % 16, a_piece = ROWS == 8 ? lane / 8 % 2 : lane / 16;
    const uint b_row = lane / 16 * 8 + lane % 8, b_piece = lane / 8 % 2;
    const uint32_t a_first = shared_address(rows) + a_row * ROW_BYTES,
                   b_first = shared_address(weights) + b_row * ROW_BYTES;
    const uint32_t a_place = (a_piece ^ lane % 8) * 16, b_place = (b_piece ^ lane % 8) * 16;
#pragma unroll
    for (uint k = 0; k < K; k += 16) {
      const uint32_t a_address = a_first + (a_place ^ k * sizeof(T)), b_address = b_first + (b_place ^ k * sizeof(T));
      uint32_t a[ROW_FRAGMENTS][4];
#pragma unroll
      for (uint i = 0; i < ROW_FRAGMENTS; ++i)
        if constexpr (ROWS == 8) {
          uint32_t upper[2];
          load_matrices(upper, a_address);
          a[i][0] = upper[0], a[i][1] = 0, a[i][2] = upper[1], a[i][3] = 0;
        } else {
          load_matrices(a[i], a_address + 16 * i * ROW_BYTES);
        }
#pragma unroll
      for (uint m = 0; m < MATRICES; ++m)
#pragma unroll
        for (uint j = 0; j < COLUMN_FRAGMENTS; j += 2) {
          constexpr uint TOGETHER = COLUMN_FRAGMENTS == 1 ? 1 : 2;
          uint32_t b[2 * TOGETHER];
          load_matrices(b, b_address + (m * matrix_step + 8 * j) * ROW_BYTES);
#pragma unroll
          for (uint i = 0; i < ROW_FRAGMENTS; ++i)
#pragma unroll
            for (uint n = 0; n < TOGETHER; ++n)
              if constexpr (FP16_ACCUMULATION)
                multiply_add_fp16(sum[m][i][j + n], a[i], b[2 * n], b[2 * n + 1]);
              else
                multiply_add_fragments(T{}, sum[m][i][j + n], a[i], b[2 * n], b[2 * n + 1]);
        }
    }
  }

  template <typename Visit>
  METAL_FUNC void for_each_pair(const Visit& visit, uint first_row, uint first_column, uint lane) const {
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
          visit(first_row + 16 * i + 8 * lower + lane / 4, first_column + 8 * j + lane % 4 * 2, sums);
        }
  }
};

/// ThreadgroupTile of tiles/threadgroup_tile.h with 16-bit elements: warps divide the columns, and the rows of a large
/// tile.
template <typename T, bool FP16_ACCUMULATION, uint MATRICES, uint ROWS, uint COLUMNS, uint WARPS>
struct WarpsTile {
  static constexpr uint ROW_PARTS = ROWS >= 64 ? 2 : 1, COLUMN_PARTS = WARPS / ROW_PARTS;
  static constexpr uint PART_ROWS = ROWS / ROW_PARTS, PART_COLUMNS = COLUMNS / COLUMN_PARTS;
  using Layout = SwizzledRows<T>;
  WarpTile<T, FP16_ACCUMULATION, MATRICES, PART_ROWS, PART_COLUMNS> part;

  METAL_FUNC static uint first_row(uint warp) { return warp / COLUMN_PARTS * PART_ROWS; }
  METAL_FUNC static uint first_column(uint warp) { return warp % COLUMN_PARTS * PART_COLUMNS; }

  METAL_FUNC void clear() { part.clear(); }
  METAL_FUNC void multiply_add(const T* rows, const T* weights, uint count, uint warp) {
    if (first_row(warp) < count)
      part.multiply_add(rows + Layout::at(first_row(warp), 0), weights + Layout::at(first_column(warp), 0), COLUMNS);
  }
  template <typename Visit>
  METAL_FUNC void for_each_pair(const Visit& visit, float*, uint warp, uint lane) const {
    part.for_each_pair(visit, first_row(warp), first_column(warp), lane);
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// sum += a b^T for 64 rows a and 128 rows b, 16 of K, by four warps together: warp w has rows 16w..16w+15 of the sum,
/// in fragments of 8 columns as WarpTile's.
#define METAL_SIM_WGMMA(TYPE, NAME)                                                                                    \
  METAL_FUNC void multiply_add_warpgroup(TYPE, float (&sum)[64], uint64_t a, uint64_t b) {                             \
    asm volatile(                                                                                                      \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {"                                              \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "         \
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "         \
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "         \
        "%62, %63}, %64, %65, 1, 1, 1, 0, 0;"                                                                          \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]),            \
          "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), "+f"(sum[12]), "+f"(sum[13]),        \
          "+f"(sum[14]), "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]),     \
          "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]), "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]),     \
          "+f"(sum[28]), "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31]), "+f"(sum[32]), "+f"(sum[33]), "+f"(sum[34]),     \
          "+f"(sum[35]), "+f"(sum[36]), "+f"(sum[37]), "+f"(sum[38]), "+f"(sum[39]), "+f"(sum[40]), "+f"(sum[41]),     \
          "+f"(sum[42]), "+f"(sum[43]), "+f"(sum[44]), "+f"(sum[45]), "+f"(sum[46]), "+f"(sum[47]), "+f"(sum[48]),     \
          "+f"(sum[49]), "+f"(sum[50]), "+f"(sum[51]), "+f"(sum[52]), "+f"(sum[53]), "+f"(sum[54]), "+f"(sum[55]),     \
          "+f"(sum[56]), "+f"(sum[57]), "+f"(sum[58]), "+f"(sum[59]), "+f"(sum[60]), "+f"(sum[61]), "+f"(sum[62]),     \
          "+f"(sum[63])                                                                                                \
        : "l"(a), "l"(b));                                                                                             \
  }
METAL_SIM_WGMMA(half, "f16")
METAL_SIM_WGMMA(bfloat, "bf16")
#undef METAL_SIM_WGMMA

/// ThreadgroupTile with 16-bit elements, fp32 accumulation, four warps, and 64 or 128 rows times 128 weight rows.
template <typename T, uint MATRICES, uint ROWS, uint COLUMNS>
struct WarpgroupTile {
  static_assert(ROWS % 64 == 0 && MATRICES * COLUMNS == 128);
  static constexpr uint BLOCKS = ROWS / 64;
  using Layout = SwizzledRows<T>;
  float sum[BLOCKS][64];

  METAL_FUNC static uint first_column(uint) { return 0; } // every warp has all of them

  METAL_FUNC void clear() {
#pragma unroll
    for (uint b = 0; b < BLOCKS; ++b)
#pragma unroll
      for (uint e = 0; e < 64; ++e)
        sum[b][e] = 0.0f;
  }

  /// Of staged rows: 16-byte units; groups of 8 rows are 1024 bytes apart; swizzled over 128 bytes.
  METAL_FUNC static uint64_t descriptor(const T* rows) {
    return uint64_t(shared_address(rows) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
  }

  METAL_FUNC void multiply_add(const T* rows, const T* weights, uint count, uint) {
    const uint64_t a = descriptor(rows), b = descriptor(weights);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (uint block = 0; block < BLOCKS; ++block)
      if (64 * block < count) {
#pragma unroll
        for (uint k = 0; k < Layout::ELEMENTS; k += 16)
          multiply_add_warpgroup(T{}, sum[block], a + (block * 64 * Layout::ROW_BYTES + k * sizeof(T)) / 16,
                                 b + k * sizeof(T) / 16);
      }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }

  template <typename Visit>
  METAL_FUNC void for_each_pair(const Visit& visit, float*, uint warp, uint lane) const {
#pragma unroll
    for (uint block = 0; block < BLOCKS; ++block)
#pragma unroll
      for (uint lower = 0; lower < 2; ++lower)
#pragma unroll
        for (uint j = 0; j < COLUMNS / 8; ++j) {
          float sums[MATRICES][2];
#pragma unroll
          for (uint m = 0; m < MATRICES; ++m) {
            sums[m][0] = sum[block][(m * COLUMNS / 8 + j) * 4 + 2 * lower];
            sums[m][1] = sum[block][(m * COLUMNS / 8 + j) * 4 + 2 * lower + 1];
          }
          visit(64 * block + 16 * warp + 8 * lower + lane / 4, 8 * j + lane % 4 * 2, sums);
        }
  }
};

#endif

template <typename T, bool FP16_ACCUMULATION, uint MATRICES, uint ROWS, uint COLUMNS, uint WARPS>
struct TensorTileOf {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static constexpr bool WARPGROUP = !FP16_ACCUMULATION && WARPS == 4 && ROWS % 64 == 0 && MATRICES * COLUMNS == 128;
#else
  static constexpr bool WARPGROUP = false;
  template <typename, uint, uint, uint>
  struct WarpgroupTile;
#endif
  using type = metal::conditional_t<WARPGROUP, WarpgroupTile<T, MATRICES, ROWS, COLUMNS>,
                                    WarpsTile<T, FP16_ACCUMULATION, MATRICES, ROWS, COLUMNS, WARPS>>;
};
template <typename T, bool FP16_ACCUMULATION, uint MATRICES, uint ROWS, uint COLUMNS, uint WARPS>
using TensorTile = typename TensorTileOf<T, FP16_ACCUMULATION, MATRICES, ROWS, COLUMNS, WARPS>::type;

} // namespace metal_sim
