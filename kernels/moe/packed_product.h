// Products with weights of 4-bit affine codes where an engine decodes them straight into the operands of its matrix
// instructions: for one token, and for tiles of few rows. The simdgroups of a threadgroup share K. Kernels that are
// compiled for such weights ask first; where the answer is false, constant, they go their own way.
#pragma once
#include "../formats/quantized.h"
#include "../tiles/early_start.h"
#include "down.h"
#include "gate_up.h"

/// Columns of a tile of `row_tile` rows, of each of its matrices; `other` where it is not a packed one.
inline uint tile_columns(uint code, uint element_bytes, uint row_tile, uint matrices, uint other) {
#ifdef METAL_SIM_CUDA
  if (code_is_packed(code, element_bytes)) {
    const PackedTile tile = packed_tile(row_tile, code_group_size(code), code_short_rows(code), THREADGROUP_BYTES);
    return tile.fits ? tile.threadgroup_n / matrices : other;
  }
#else
  (void)code, (void)element_bytes, (void)row_tile, (void)matrices;
#endif
  return other;
}

#ifdef METAL_SIM_CUDA

/// How many threadgroups of a kernel for rows of T a multiprocessor is to run at a time, for the compiler: as many as
/// their memory allows. 0: it is not a packed product, and the compiler decides.
template <typename T, uint CODE, uint ROW_TILE>
constexpr uint packed_least_threadgroups() {
  if (!code_is_packed(CODE, sizeof(T)) || ROW_TILE > PACKED_ROW_TILE)
    return 0;
  return ROW_TILE <= BASE_ROW_TILE ? 4 : code_short_rows(CODE) ? 3 : 2;
}

inline metal_sim::PackedMatrix packed_matrix(thread const QuantizedMatrix& matrix) {
  return {matrix.codes, matrix.scales, matrix.biases, matrix.codes_stride, matrix.scales_stride};
}

/// Of weights with `CODE`.
template <typename T, uint CODE, uint MATRICES, uint WEIGHT_ROWS, uint X_ROWS, uint SLAB, uint SIMDGROUPS,
          uint K_SIMDGROUPS, uint STAGES, uint CHUNK_STEPS>
using PackedProductOf =
    metal_sim::PackedProduct<T, code_group_size(CODE), code_scale_type(CODE) == SCALE_FP16, MATRICES, WEIGHT_ROWS,
                             X_ROWS, SLAB, SIMDGROUPS, K_SIMDGROUPS, STAGES, CHUNK_STEPS>;
/// For one token: no simdgroup waits for another's scales.
template <typename T, uint CODE, uint MATRICES, uint WEIGHT_ROWS, uint SIMDGROUPS>
using PackedDecodeOf = PackedProductOf<T, CODE, MATRICES, WEIGHT_ROWS, 1, PACKED_DECODE_SLAB, SIMDGROUPS, SIMDGROUPS,
                                       PACKED_DECODE_STAGES, 0>;

/// store(row, column, sums) for pairs of neighbouring columns, after `gather`.
template <typename Product, uint MATRICES, uint WEIGHT_ROWS, typename Store>
inline void store_packed(thread const Store& store, threadgroup const uchar* memory, uint rows, uint thread_index,
                         uint threads) {
  for (uint e = thread_index; e < rows * (WEIGHT_ROWS / 2); e += threads) {
    const uint row = e / (WEIGHT_ROWS / 2), column = e % (WEIGHT_ROWS / 2) * 2;
    float sums[MATRICES][2];
    for (uint m = 0; m < MATRICES; ++m)
      for (uint i = 0; i < 2; ++i)
        sums[m][i] = Product::at(memory, row, m, column + i);
    store(row, column, sums);
  }
}

/// Rows of one expert times weight rows of MATRICES matrices from first_column on.
template <uint CODE, typename T, uint ROW_TILE, uint MATRICES, typename Source, typename Store>
inline bool multiply_packed_tile(thread const Source& rows, uint count,
                                 thread const QuantizedMatrix (&matrices)[MATRICES], uint first_column, uint columns,
                                 uint K, thread const Store& store, threadgroup uchar* memory, uint simdgroup,
                                 uint lane) {
  constexpr PackedTile TILE = packed_tile(ROW_TILE, code_group_size(CODE), code_short_rows(CODE), THREADGROUP_BYTES);
  if constexpr (code_is_packed(CODE, sizeof(T)) && TILE.fits) {
    constexpr uint WEIGHT_ROWS = TILE.simdgroup_n / MATRICES;
    constexpr uint COLUMNS = TILE.threadgroup_n / MATRICES;
    using Product = PackedProductOf<T, CODE, MATRICES, WEIGHT_ROWS, ROW_TILE, PACKED_TILE_SLAB, GEMM_LANE_SIMDGROUPS,
                                    packed_k_simdgroups(code_short_rows(CODE)), PACKED_TILE_STAGES, PACKED_CHUNK_STEPS>;
    static_assert(Product::BYTES <= TILE.bytes, "the host gives what the kernel takes");
    const uint thread_index = simdgroup * SIMD_WIDTH + lane;
    metal_sim::PackedMatrix packed[MATRICES];
    UNROLL
    for (uint m = 0; m < MATRICES; ++m)
      packed[m] = packed_matrix(matrices[m]);
    Product product;
    product.clear();
    product.multiply_add_all(
        memory, packed, first_column, columns - 1, [&](uint row) { return rows.at(row); }, count, K, simdgroup, lane);
    product.gather(memory, simdgroup, lane);
    store_packed<Product, MATRICES, COLUMNS>(store, memory, count, thread_index, GEMM_LANE_SIMDGROUPS * SIMD_WIDTH);
    return true;
  }
  return false;
}

/// One row times weight rows of gate and up.
template <uint CODE, typename T, uint MATRICES, typename Store>
inline bool multiply_packed_row(device const T* x, thread const QuantizedMatrix (&matrices)[MATRICES],
                                uint first_column, uint columns, uint K, thread const Store& store, uint simdgroup,
                                uint lane) {
  if constexpr (code_is_packed(CODE, sizeof(T))) {
    using Product = PackedDecodeOf<T, CODE, MATRICES, PACKED_DECODE_COLUMNS, GEMV_LANE_SIMDGROUPS>;
    __shared__ __align__(16) uchar memory[Product::BYTES];
    metal_sim::PackedMatrix packed[MATRICES];
    UNROLL
    for (uint m = 0; m < MATRICES; ++m)
      packed[m] = packed_matrix(matrices[m]);
    Product product;
    product.clear();
    product.multiply_add_all(memory, packed, first_column, columns - 1, [&](uint) { return x; }, 1, K, simdgroup, lane);
    product.gather(memory, simdgroup, lane);
    store_packed<Product, MATRICES, PACKED_DECODE_COLUMNS>(store, memory, 1, simdgroup * SIMD_WIDTH + lane,
                                                           GEMV_LANE_SIMDGROUPS * SIMD_WIDTH);
    return true;
  }
  return false;
}

/// A slot of a token, in `down`.
template <typename T>
struct PackedSlot {
  metal_sim::PackedMatrix matrix;
  device const T* x;
  uint K; // 0: dropped
  float weight;
};
static_assert(sizeof(PackedSlot<half>) <= PACKED_SLOT_BYTES, "the host gives what the kernel takes");

/// Where a simdgroup is in the slabs of all slots, one after the other.
struct PackedPlace {
  uint slot = 0;
  uint first = 0; // slab of the slot

  /// To a later slab.
  template <typename T>
  void go_to(uint slab, threadgroup const PackedSlot<T>* slots) thread {
    for (;;) {
      const uint slabs = divide_up(slots[slot].K, PACKED_DECODE_SLAB);
      if (slab - first < slabs)
        return;
      first += slabs;
      ++slot;
    }
  }
};

/// down of one token, its slots weighted and added. It waits for gate_up; with short rows, which are those of layers
/// that take little more time than kernels need to begin and end, when its first weights are on their way.
template <uint CODE, typename T>
inline bool down_packed_decode(device const T* h, thread const ExpertPart& routed, thread const ExpertPart& shared,
                               device const T* bias, device const int* ids, device const uchar* weights,
                               device const uchar* shared_weights, device T* out, constant ExpertsArgs& args,
                               threadgroup float* sums, uint block, uint token, uint simdgroup, uint lane) {
  if constexpr (code_is_packed(CODE, sizeof(T))) {
    constexpr bool SHORT = code_short_rows(CODE);
    constexpr PackedDown SIZES = packed_down(code_group_size(CODE), SHORT, THREADGROUP_BYTES);
    constexpr uint SIMDGROUPS = SIZES.simdgroups, COLUMNS = SIZES.columns;
    using Product = PackedDecodeOf<T, CODE, 1, COLUMNS, SIMDGROUPS>;
    static_assert(Product::BYTES + PACKED_SLOTS * PACKED_SLOT_BYTES <= SIZES.bytes,
                  "the host gives what the kernel takes");
    threadgroup uchar* memory = reinterpret_cast<threadgroup uchar*>(sums);
    PackedSlot<T>* table = reinterpret_cast<PackedSlot<T>*>(memory + Product::BYTES);
    const uint thread_index = simdgroup * SIMD_WIDTH + lane;
    const uint first_column = block * COLUMNS, slots = args.top_k + args.shared;
    Product total, product;
    total.clear();
    product.clear();
    for (uint first_slot = 0; first_slot < slots; first_slot += PACKED_SLOTS) {
      const uint count = min(slots - first_slot, PACKED_SLOTS);
      if (first_slot > 0)
        threadgroup_barrier(mem_flags::mem_threadgroup);
      if (thread_index < count) {
        const uint slot = first_slot + thread_index;
        const uint expert = slot_expert(ids, args, token, slot);
        PackedSlot<T> own{};
        if (expert != NO_EXPERT) {
          own.matrix = packed_matrix(expert_matrix(routed, shared, expert, args.experts, CODE));
          own.x = h + (ulong(token) * slots + slot) * args.h_row_stride;
          own.K = slot < args.top_k ? args.intermediate : args.shared_intermediate;
          own.weight = down_weight(weights, shared_weights, args, token, slot);
        }
        table[thread_index] = own;
      }
      if (!SHORT)
        wait_for_previous_kernel();
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint slabs = 0;
      for (uint i = 0; i < count; ++i)
        slabs += divide_up(table[i].K, PACKED_DECODE_SLAB);
      PackedPlace copied, copied_rows, used;
      uint current = ~0u;
      Product::template for_each_slab<SHORT>(
          memory, Product::steps(slabs, simdgroup), simdgroup,
          [&](uchar* slab, uint step) {
            const uint index = simdgroup + step * SIMDGROUPS;
            copied.go_to(index, table);
            const PackedSlot<T>& slot = table[copied.slot];
            const metal_sim::PackedMatrix matrix[1] = {slot.matrix};
            const uint first = (index - copied.first) * PACKED_DECODE_SLAB;
            Product::copy_codes(slab, matrix, first_column, args.hidden - 1, first, slot.K, lane);
            Product::template copy_scales<SIMD_WIDTH>(slab + Product::SCALES_AT, matrix, first_column, args.hidden - 1,
                                                      first, slot.K, lane);
          },
          [] { wait_for_previous_kernel(); },
          [&](uchar* to, uint step) {
            const uint index = simdgroup + step * SIMDGROUPS;
            copied_rows.go_to(index, table);
            const PackedSlot<T>& slot = table[copied_rows.slot];
            device const T* x = slot.x;
            Product::copy_rows(to, {[&](uint) { return x; }, 1, lane}, (index - copied_rows.first) * PACKED_DECODE_SLAB,
                               slot.K, lane);
          },
          [&](const uchar* slab, const uchar* x, uint step) {
            used.go_to(simdgroup + step * SIMDGROUPS, table);
            if (used.slot != current && current != ~0u)
              product.add_to(total, table[current].weight);
            current = used.slot;
            product.multiply_add(slab, x, slab + Product::SCALES_AT, 0, lane);
          });
      if (current != ~0u)
        product.add_to(total, table[current].weight);
    }
    total.gather(memory, simdgroup, lane);
    const uint column = first_column + thread_index;
    if (thread_index >= COLUMNS || column >= args.hidden)
      return true;
    float sum = Product::at(memory, 0, 0, thread_index);
    if (args.has_bias)
      for (uint slot = 0; slot < args.top_k; ++slot) {
        const uint expert = slot_expert(ids, args, token, slot);
        if (expert != NO_EXPERT)
          sum = fma(down_weight(weights, shared_weights, args, token, slot),
                    float(bias[ulong(expert) * args.hidden + column]), sum);
      }
    out[column] = T(sum);
    return true;
  }
  return false;
}

#endif
