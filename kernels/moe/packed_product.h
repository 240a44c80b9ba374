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

/// The row tile (x) and the block of columns (y) of threadgroup `group`. Tiles that are not in use take a place until
/// they know: where a tile has few blocks, the grid is (blocks, tiles), and those stand behind all others. Where it has
/// many, the blocks of all tiles with the same weights stand together.
inline uint2 tile_and_block(uint code, uint3 group) {
  return code_short_rows(code) ? uint2(group.y, group.x) : uint2(group.x, group.y);
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
template <typename T, uint CODE, uint MATRICES, uint WEIGHT_ROWS, uint X_ROWS>
using PackedProductOf =
    metal_sim::PackedProduct<T, code_group_size(CODE), code_scale_type(CODE) == SCALE_FP16, MATRICES, WEIGHT_ROWS,
                             X_ROWS, PACKED_TILE_SLAB, GEMM_LANE_SIMDGROUPS, packed_k_simdgroups(code_short_rows(CODE)),
                             PACKED_TILE_STAGES, PACKED_CHUNK_STEPS>;
template <typename T, uint CODE, uint MATRICES, uint WEIGHT_ROWS, uint SIMDGROUPS, uint STAGES, uint X_STAGES,
          bool WHOLE>
using PackedRowOf = metal_sim::PackedRow<T, code_group_size(CODE), code_scale_type(CODE) == SCALE_FP16, MATRICES,
                                         WEIGHT_ROWS, PACKED_DECODE_SLAB, SIMDGROUPS, STAGES, X_STAGES, WHOLE>;

/// Rows of one expert times weight rows of MATRICES matrices from first_column on. If WAITS, for the kernel before,
/// which makes the rows, when the first weights are on their way; the next one is let go then.
template <uint CODE, typename T, uint ROW_TILE, bool WAITS, uint MATRICES, typename Source, typename Store>
inline bool multiply_packed_tile(thread const Source& rows, uint count,
                                 thread const QuantizedMatrix (&matrices)[MATRICES], uint first_column, uint columns,
                                 uint K, thread const Store& store, threadgroup uchar* memory, uint simdgroup,
                                 uint lane) {
  constexpr PackedTile TILE = packed_tile(ROW_TILE, code_group_size(CODE), code_short_rows(CODE), THREADGROUP_BYTES);
  if constexpr (code_is_packed(CODE, sizeof(T)) && TILE.fits) {
    constexpr uint WEIGHT_ROWS = TILE.simdgroup_n / MATRICES;
    constexpr uint COLUMNS = TILE.threadgroup_n / MATRICES;
    using Product = PackedProductOf<T, CODE, MATRICES, WEIGHT_ROWS, ROW_TILE>;
    static_assert(Product::BYTES <= TILE.bytes, "the host gives what the kernel takes");
    metal_sim::PackedMatrix packed[MATRICES];
    UNROLL
    for (uint m = 0; m < MATRICES; ++m)
      packed[m] = packed_matrix(matrices[m]);
    Product product;
    product.clear();
    product.template multiply_add_all<WAITS>(
        memory, packed, first_column, columns - 1, [&](uint row) { return rows.at(row); }, count, K, simdgroup, lane,
        [] {
          wait_for_previous_kernel();
          let_next_kernel_start();
        });
    product.gather(memory, count, simdgroup, lane);
    // Pairs of neighbouring columns.
    for (uint e = simdgroup * SIMD_WIDTH + lane; e < count * (COLUMNS / 2); e += GEMM_LANE_SIMDGROUPS * SIMD_WIDTH) {
      const uint row = e / (COLUMNS / 2), column = e % (COLUMNS / 2) * 2;
      float sums[MATRICES][2];
      UNROLL
      for (uint m = 0; m < MATRICES; ++m) {
        const auto pair = Product::pair_at(memory, row, m, column);
        sums[m][0] = pair.x, sums[m][1] = pair.y;
      }
      store(row, column, sums);
    }
    return true;
  }
  return false;
}

/// One row times weight rows of gate and up.
template <uint CODE, typename T, uint MATRICES, typename Store>
inline bool multiply_packed_row(device const T* x, thread const QuantizedMatrix (&matrices)[MATRICES],
                                uint first_column, uint columns, uint K, thread const Store& store,
                                threadgroup uchar* memory, uint simdgroup, uint lane) {
  if constexpr (code_is_packed(CODE, sizeof(T))) {
    constexpr bool WHOLE = code_short_rows(CODE);
    constexpr PackedGateUp SIZES = packed_gate_up(code_group_size(CODE), MATRICES, WHOLE);
    constexpr uint PARTS = SIZES.columns / PACKED_DECODE_COLUMNS, STAGES = WHOLE ? PARTS : PACKED_DECODE_STAGES;
    using Product =
        PackedRowOf<T, CODE, MATRICES, PACKED_DECODE_COLUMNS, SIZES.simdgroups, STAGES, WHOLE ? 1 : STAGES, WHOLE>;
    static_assert(Product::BYTES <= SIZES.bytes, "the host gives what the kernel takes");
    metal_sim::PackedMatrix packed[MATRICES];
    UNROLL
    for (uint m = 0; m < MATRICES; ++m)
      packed[m] = packed_matrix(matrices[m]);
    Product product[PARTS];
    UNROLL
    for (uint i = 0; i < PARTS; ++i)
      product[i].clear();
    const auto first_of = [&](uint step) { return (simdgroup + step * SIZES.simdgroups) * PACKED_DECODE_SLAB; };
    const auto elements = [&](uint step) { return Product::load_elements(x, 1.0f, first_of(step), K, lane); };
    if constexpr (WHOLE) {
      const auto own = elements(0);
      Product::start_whole(memory, packed, first_column, columns - 1, first_of(0), K, simdgroup, lane);
      Product::multiply_add_whole(product, memory, own, simdgroup, lane);
    } else {
      product[0].template multiply_add_all<true>(
          memory, Product::steps(divide_up(K, PACKED_DECODE_SLAB), simdgroup), simdgroup, lane,
          [&](uchar* slab, uint step) {
            Product::copy_weights(slab, packed, first_column, columns - 1, first_of(step), K, lane);
          },
          [] {}, elements);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (uint i = 0; i < PARTS; ++i)
      product[i].put(memory + i * Product::SUM_BYTES, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint column = (simdgroup * SIMD_WIDTH + lane) * 2; // and its neighbour
    if (column < SIZES.columns) {
      threadgroup const uchar* from = memory + column / PACKED_DECODE_COLUMNS * Product::SUM_BYTES;
      float sums[MATRICES][2];
      for (uint m = 0; m < MATRICES; ++m)
        for (uint i = 0; i < 2; ++i)
          sums[m][i] = Product::at(from, m, column % PACKED_DECODE_COLUMNS + i);
      store(0, column, sums);
    }
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

/// down of one token, its slots weighted and added. It waits for gate_up when its first weights are on their way.
template <uint CODE, typename T>
inline bool down_packed_decode(device const T* h, thread const ExpertPart& routed, thread const ExpertPart& shared,
                               device const T* bias, device const int* ids, device const uchar* weights,
                               device const uchar* shared_weights, device T* out, constant ExpertsArgs& args,
                               threadgroup float* sums, uint block, uint token, uint simdgroup, uint lane) {
  if constexpr (code_is_packed(CODE, sizeof(T))) {
    constexpr PackedDown SIZES = packed_down(code_group_size(CODE), code_short_rows(CODE), THREADGROUP_BYTES);
    constexpr uint SIMDGROUPS = SIZES.simdgroups, COLUMNS = SIZES.columns;
    using Product = PackedRowOf<T, CODE, 1, COLUMNS, SIMDGROUPS, PACKED_DECODE_STAGES, 1, false>;
    static_assert(Product::BYTES + PACKED_SLOTS * PACKED_SLOT_BYTES <= SIZES.bytes,
                  "the host gives what the kernel takes");
    threadgroup uchar* memory = reinterpret_cast<threadgroup uchar*>(sums);
    PackedSlot<T>* table = reinterpret_cast<PackedSlot<T>*>(memory + Product::BYTES);
    const uint thread_index = simdgroup * SIMD_WIDTH + lane;
    const uint first_column = block * COLUMNS, slots = args.top_k + args.shared;
    Product product;
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
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint slabs = 0;
      for (uint i = 0; i < count; ++i)
        slabs += divide_up(table[i].K, PACKED_DECODE_SLAB);
      PackedPlace copied, read;
      product.template multiply_add_all<false>(
          memory, Product::steps(slabs, simdgroup), simdgroup, lane,
          [&](uchar* slab, uint step) {
            const uint index = simdgroup + step * SIMDGROUPS;
            copied.go_to(index, table);
            const PackedSlot<T>& slot = table[copied.slot];
            const metal_sim::PackedMatrix matrix[1] = {slot.matrix};
            Product::copy_weights(slab, matrix, first_column, args.hidden - 1,
                                  (index - copied.first) * PACKED_DECODE_SLAB, slot.K, lane);
          },
          [] { wait_for_previous_kernel(); },
          [&](uint step) {
            const uint index = simdgroup + step * SIMDGROUPS;
            read.go_to(index, table);
            const PackedSlot<T>& slot = table[read.slot];
            return Product::load_elements(slot.x, slot.weight, (index - read.first) * PACKED_DECODE_SLAB, slot.K, lane);
          });
    }
    product.gather(memory, simdgroup, lane);
    const uint column = first_column + thread_index;
    if (thread_index >= COLUMNS || column >= args.hidden)
      return true;
    float sum = Product::at(memory, 0, thread_index);
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
