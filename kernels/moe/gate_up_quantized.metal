// gate_up on quantised weights: h = act(x Wg^T + bg) * (x Wu^T + bu). Shapes and families as in gate_up.metal; gate and
// up are two parts, each with its own buffers and a record per expert (docs/formats.md), so that formats and bits may
// differ between them and from expert to expert. Bytes to move: those of the codes, scales and biases of the experts
// chosen.
#include "gate_up.h"
#include "gemm_quantized.h"
#include "gemv_quantized.h"
#include "packed_product.h"

/// A projection of the routed and of the shared experts.
struct GateUpParts {
  ExpertPart routed;
  ExpertPart shared;

  QuantizedMatrix of(uint expert, uint experts, uint code) thread const {
    return expert_matrix(routed, shared, expert, experts, code);
  }
};

/// Columns column .. column + R - 1 of h, in the GEMV families: first gate, then up.
template <uint MAX_ROWS, typename T, bool GATED, typename Source>
struct GateUpQuantizedBlock {
  static constexpr constant uint R = quantized_columns<MAX_ROWS>();
  Source rows;
  device T* h;          // of the tile's first row
  device const T* bias; // of the expert, or null
  uint count;           // rows
  uint intermediate;    // columns of h
  uint end;
  uint lane;
  thread const QuantizedMatrix& gate;
  thread const QuantizedMatrix& up;
  constant ExpertsArgs& args;

  template <uint C>
  void run(uint column, uint first) thread const {
    LaneSums<R * C> gates = {}, ups = {}; // without a gate the same, and `ups` is not used
    // A loop, for all decoders are in it once.
    for (uint matrix = 0; matrix < 2; ++matrix) {
      gates = ups;
      QuantizedRows<R> w{gate, column, intermediate - 1};
      if (GATED && matrix == 1)
        w.matrix = up;
      if (GATED || matrix == 1) {
        float sum[R][C];
        dot_quantized_block<T>(w, rows, first, count, args.hidden, lane, sum);
        ups = sum_lanes<0, R>(sum, lane);
      }
    }
    if (!GATED)
      gates = ups;
    for (uint e = lane; e < R * C; e += SIMD_WIDTH) {
      const uint n = column + e / C;
      if (n >= end || first + e % C >= count)
        continue;
      float gate_sum = gates.at(e), up_sum = ups.at(e);
      if (bias) {
        gate_sum += float(bias[GATED ? gate_row(n, args.interleaved) : n]);
        if (GATED)
          up_sum += float(bias[up_row(n, intermediate, args.interleaved)]);
      }
      h[ulong(rows.offset(first + e % C)) * args.h_row_stride + n] =
          T(activate(args.activation, gate_sum, up_sum, args.alpha, args.limit));
    }
  }
};

/// The columns of one threadgroup for `count` rows of one expert.
template <uint MAX_ROWS, typename T, bool GATED, typename Source>
inline void gate_up_quantized_gemv(thread const Source& rows, uint count, thread const GateUpParts& gate,
                                   thread const GateUpParts& up, device const T* bias, uint expert, device T* h,
                                   uint first_column, constant ExpertsArgs& args, uint simdgroup, uint lane) {
  using Block = GateUpQuantizedBlock<MAX_ROWS, T, GATED, Source>;
  const bool is_routed = expert < args.experts;
  const QuantizedMatrix gate_matrix = gate.of(expert, args.experts, FIRST_MATRIX);
  QuantizedMatrix up_matrix = gate_matrix;
  if (GATED)
    up_matrix = up.of(expert, args.experts, SECOND_MATRIX);
  device const T* b = is_routed && args.has_bias ? bias + ulong(expert) * (GATED ? 2 : 1) * args.intermediate : nullptr;
  const uint intermediate = is_routed ? args.intermediate : args.shared_intermediate;
  const uint end = min(first_column + QUANTIZED_THREADGROUP_COLUMNS, intermediate);
  const Block block{rows, h, b, count, intermediate, end, lane, gate_matrix, up_matrix, args};
  for (uint column = first_column + simdgroup * Block::R; column < end; column += GEMV_LANE_SIMDGROUPS * Block::R)
    for_quantized_row_runs<MAX_ROWS>(block, column, count);
}

#ifdef METAL_SIM_CUDA
/// What both matrices are stored as, where that is the same; else 0.
template <bool GATED>
constexpr uint GATE_UP_CODE = !GATED || FIRST_MATRIX == SECOND_MATRIX ? FIRST_MATRIX : 0;

/// The most of a threadgroup of decode.
constexpr constant uint GATE_UP_MAX_SIMDGROUPS =
    code_is_packed(FIRST_MATRIX, 2)
        ? packed_gate_up(code_group_size(FIRST_MATRIX), 1, code_short_rows(FIRST_MATRIX)).simdgroups
        : GEMV_LANE_SIMDGROUPS;
template <typename T, bool GATED>
constexpr uint gate_up_quantized_decode_least_threadgroups = !code_is_packed(GATE_UP_CODE<GATED>, sizeof(T)) ? 0
                                                             : code_short_rows(GATE_UP_CODE<GATED>)          ? 2
                                                                                                             : 4;
template <typename T, bool GATED, uint ROW_TILE, uint TILE_N>
constexpr uint gate_up_quantized_gemm_least_threadgroups =
    packed_least_threadgroups<T, GATE_UP_CODE<GATED>, ROW_TILE>();

/// Whether it has done what gate_up_quantized_decode does.
template <typename T, bool GATED>
inline bool gate_up_packed_decode(thread const OneRow<T>& rows, thread const GateUpParts& gate,
                                  thread const GateUpParts& up, device const T* bias, uint expert, device T* h,
                                  uint block, constant ExpertsArgs& args, threadgroup uchar* memory, uint simdgroup,
                                  uint lane) {
  constexpr uint MATRICES = GATED ? 2 : 1, CODE = GATE_UP_CODE<GATED>;
  if constexpr (code_is_packed(CODE, sizeof(T))) {
    const bool is_routed = expert < args.experts;
    const uint intermediate = is_routed ? args.intermediate : args.shared_intermediate;
    constexpr uint COLUMNS = packed_gate_up(code_group_size(CODE), MATRICES, code_short_rows(CODE)).columns;
    const uint first_column = block * COLUMNS;
    let_down_start(args, COLUMNS, PACKED_RESIDENT_THREADGROUPS);
    if (first_column >= intermediate)
      return true;
    QuantizedMatrix matrices[MATRICES];
    matrices[0] = gate.of(expert, args.experts, CODE);
    if (GATED)
      matrices[MATRICES - 1] = up.of(expert, args.experts, CODE);
    device const T* b = is_routed && args.has_bias ? bias + ulong(expert) * MATRICES * args.intermediate : nullptr;
    const GateUpStore<T, GATED, OneRow<T>> store{rows, h, b, 1, first_column, intermediate, args};
    return multiply_packed_row<CODE>(rows.row, matrices, first_column, intermediate, args.hidden, store, memory,
                                     simdgroup, lane);
  }
  return false;
}
#else
constexpr constant uint GATE_UP_MAX_SIMDGROUPS = GEMV_LANE_SIMDGROUPS;
#endif

/// Asks for a threadgroup's id, and the first ones for all experts' records: what lies between a threadgroup and its
/// first weights, one behind the other.
inline void prefetch_ids_and_records(device const int* id, device const ExpertMatrix* gate,
                                     device const ExpertMatrix* up, uint experts, uint first, uint thread_index) {
  constexpr uint LINE = 128 / sizeof(ExpertMatrix); // records of a cache line
  if (thread_index == 0)
    prefetch_line(id);
  const uint record = (first + thread_index) * LINE;
  if (record < experts) {
    prefetch_line(gate + record);
    prefetch_line(up + record);
  }
}

template <typename T, bool GATED>
[[kernel, max_total_threads_per_threadgroup(GATE_UP_MAX_SIMDGROUPS* SIMD_WIDTH)]] void gate_up_quantized_decode(
    device const T* x [[buffer(0)]], device const uchar* gate_codes [[buffer(1)]],
    device const uchar* gate_scales [[buffer(2)]], device const uchar* gate_biases [[buffer(3)]],
    device const ExpertMatrix* gate_table [[buffer(4)]], device const uchar* up_codes [[buffer(5)]],
    device const uchar* up_scales [[buffer(6)]], device const uchar* up_biases [[buffer(7)]],
    device const ExpertMatrix* up_table [[buffer(8)]], device const uchar* shared_gate_codes [[buffer(9)]],
    device const uchar* shared_gate_scales [[buffer(10)]], device const uchar* shared_gate_biases [[buffer(11)]],
    device const ExpertMatrix* shared_gate_table [[buffer(12)]], device const uchar* shared_up_codes [[buffer(13)]],
    device const uchar* shared_up_scales [[buffer(14)]], device const uchar* shared_up_biases [[buffer(15)]],
    device const ExpertMatrix* shared_up_table [[buffer(16)]], device const T* bias [[buffer(17)]],
    device const int* ids [[buffer(18)]], device T* h [[buffer(19)]], constant ExpertsArgs& args [[buffer(20)]],
    threadgroup uchar* memory [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint slot = group.y, token = group.z;
  constexpr uint THREADS = GATE_UP_MAX_SIMDGROUPS * SIMD_WIDTH;
  prefetch_ids_and_records(
      ids + (ulong(token) * args.ids_token_stride + min(slot, args.top_k - 1) * args.ids_slot_stride) * args.id_words,
      gate_table, up_table, slot == 0 && token == 0 ? args.experts : 0, group.x * THREADS,
      simdgroup * SIMD_WIDTH + lane);
  wait_for_previous_kernel();
  const uint slots = args.top_k + args.shared;
  const uint expert = slot < args.top_k
                          ? load_id(ids, ulong(token) * args.ids_token_stride + slot * args.ids_slot_stride,
                                    args.id_words, args.experts)
                          : args.experts + slot - args.top_k;
  if (expert == NO_EXPERT)
    return; // dropped: `down` skips the row too
  const GateUpParts gate{{gate_codes, gate_scales, gate_biases, gate_table},
                         {shared_gate_codes, shared_gate_scales, shared_gate_biases, shared_gate_table}};
  const GateUpParts up{{up_codes, up_scales, up_biases, up_table},
                       {shared_up_codes, shared_up_scales, shared_up_biases, shared_up_table}};
  const OneRow<T> rows{x + ulong(token) * args.x_row_stride};
  device T* to = h + (ulong(token) * slots + slot) * args.h_row_stride;
#ifdef METAL_SIM_CUDA
  if (gate_up_packed_decode<T, GATED>(rows, gate, up, bias, expert, to, group.x, args, memory, simdgroup, lane))
    return;
#else
  (void)memory;
#endif
  gate_up_quantized_gemv<1, T, GATED>(rows, 1, gate, up, bias, expert, to, group.x * QUANTIZED_THREADGROUP_COLUMNS,
                                      args, simdgroup, lane);
}

template <typename T, bool GATED>
[[kernel, max_total_threads_per_threadgroup(GEMV_LANE_SIMDGROUPS* SIMD_WIDTH)]] void gate_up_quantized_prefill4(
    device const T* x [[buffer(0)]], device const uchar* gate_codes [[buffer(1)]],
    device const uchar* gate_scales [[buffer(2)]], device const uchar* gate_biases [[buffer(3)]],
    device const ExpertMatrix* gate_table [[buffer(4)]], device const uchar* up_codes [[buffer(5)]],
    device const uchar* up_scales [[buffer(6)]], device const uchar* up_biases [[buffer(7)]],
    device const ExpertMatrix* up_table [[buffer(8)]], device const uchar* shared_gate_codes [[buffer(9)]],
    device const uchar* shared_gate_scales [[buffer(10)]], device const uchar* shared_gate_biases [[buffer(11)]],
    device const ExpertMatrix* shared_gate_table [[buffer(12)]], device const uchar* shared_up_codes [[buffer(13)]],
    device const uchar* shared_up_scales [[buffer(14)]], device const uchar* shared_up_biases [[buffer(15)]],
    device const ExpertMatrix* shared_up_table [[buffer(16)]], device const T* bias [[buffer(17)]],
    device const int* ids [[buffer(18)]], device const uint* sorted_rows [[buffer(19)]],
    device const RowTile* tiles [[buffer(20)]], device T* h [[buffer(21)]], constant ExpertsArgs& args [[buffer(22)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const TileRows<PREFILL4_ROW_TILE> tile = tile_rows<PREFILL4_ROW_TILE>(ids, tiles, args, group.x, lane);
  if (tile.count == 0)
    return;
  const GateUpParts gate{{gate_codes, gate_scales, gate_biases, gate_table},
                         {shared_gate_codes, shared_gate_scales, shared_gate_biases, shared_gate_table}};
  const GateUpParts up{{up_codes, up_scales, up_biases, up_table},
                       {shared_up_codes, shared_up_scales, shared_up_biases, shared_up_table}};
  const GatheredRows<T, PREFILL4_ROW_TILE> rows{x, sorted_rows + tile.first, args.top_k + args.shared,
                                                args.x_row_stride, tile};
  gate_up_quantized_gemv<GEMV_ROWS, T, GATED>(rows, tile.count, gate, up, bias, tile.expert,
                                              h + ulong(tile.first) * args.h_row_stride,
                                              group.y * QUANTIZED_THREADGROUP_COLUMNS, args, simdgroup, lane);
}

template <typename T, bool GATED, uint ROW_TILE, uint TILE_N>
[[kernel, max_total_threads_per_threadgroup(GEMM_LANE_SIMDGROUPS* SIMD_WIDTH)]] void gate_up_quantized_gemm(
    device const T* x [[buffer(0)]], device const uchar* gate_codes [[buffer(1)]],
    device const uchar* gate_scales [[buffer(2)]], device const uchar* gate_biases [[buffer(3)]],
    device const ExpertMatrix* gate_table [[buffer(4)]], device const uchar* up_codes [[buffer(5)]],
    device const uchar* up_scales [[buffer(6)]], device const uchar* up_biases [[buffer(7)]],
    device const ExpertMatrix* up_table [[buffer(8)]], device const uchar* shared_gate_codes [[buffer(9)]],
    device const uchar* shared_gate_scales [[buffer(10)]], device const uchar* shared_gate_biases [[buffer(11)]],
    device const ExpertMatrix* shared_gate_table [[buffer(12)]], device const uchar* shared_up_codes [[buffer(13)]],
    device const uchar* shared_up_scales [[buffer(14)]], device const uchar* shared_up_biases [[buffer(15)]],
    device const ExpertMatrix* shared_up_table [[buffer(16)]], device const T* bias [[buffer(17)]],
    device const int* ids [[buffer(18)]], device const uint* sorted_rows [[buffer(19)]],
    device const RowTile* tiles [[buffer(20)]], device T* h [[buffer(21)]], constant ExpertsArgs& args [[buffer(22)]],
    threadgroup uchar* memory [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint MATRICES = GATED ? 2 : 1;
  using Tile = GemmTile<T, float, MATRICES, ROW_TILE, TILE_N, true>;
  const uint code = GATED && FIRST_MATRIX != SECOND_MATRIX ? 0 : FIRST_MATRIX;
  const uint2 place = tile_and_block(code, group);
  const TileRows<ROW_TILE> tile = tile_rows<ROW_TILE>(ids, tiles, args, place.x, lane);
  const uint first_column = place.y * tile_columns(code, sizeof(T), ROW_TILE, MATRICES, Tile::COLUMNS);
  const bool is_routed = tile.expert < args.experts;
  const uint intermediate = is_routed ? args.intermediate : args.shared_intermediate;
  let_next_kernel_start();
  if (tile.count == 0 || first_column >= intermediate)
    return;

  QuantizedStager<T, MATRICES, Tile::COLUMNS, Tile::K_TILE, typename Tile::Layout> weights;
  const GateUpParts gate{{gate_codes, gate_scales, gate_biases, gate_table},
                         {shared_gate_codes, shared_gate_scales, shared_gate_biases, shared_gate_table}};
  weights.matrices[0] = gate.of(tile.expert, args.experts, FIRST_MATRIX);
  if (GATED) {
    const GateUpParts up{{up_codes, up_scales, up_biases, up_table},
                         {shared_up_codes, shared_up_scales, shared_up_biases, shared_up_table}};
    weights.matrices[MATRICES - 1] = up.of(tile.expert, args.experts, SECOND_MATRIX);
  }
  weights.first_column = first_column;
  weights.columns = intermediate;
  weights.thread_index = simdgroup * SIMD_WIDTH + lane;

  const GatheredRows<T, ROW_TILE> rows{x, sorted_rows + tile.first, args.top_k + args.shared, args.x_row_stride, tile};
  device const T* b = is_routed && args.has_bias ? bias + ulong(tile.expert) * MATRICES * args.intermediate : nullptr;
  const GateUpStore<T, GATED, GatheredRows<T, ROW_TILE>> store{
      rows, h + ulong(tile.first) * args.h_row_stride, b, tile.count, first_column, intermediate, args};
#ifdef METAL_SIM_CUDA
  if (multiply_packed_tile<GATE_UP_CODE<GATED>, T, ROW_TILE, false>(
          rows, tile.count, weights.matrices, first_column, intermediate, args.hidden, store, memory, simdgroup, lane))
    return;
#endif
  Tile product;
  product.multiply_decoded(rows, tile.count, weights, args.hidden, memory, simdgroup, lane,
                           whole_vectors<T>(args.hidden));
  product.for_each_pair(store, memory, simdgroup, lane);
}

#define INSTANTIATE(NAME, ...) template [[host_name(NAME)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// One stage in every family.
#define FAMILIES(STAGE, GATED, T, T_NAME)                                                                              \
  INSTANTIATE(STAGE "_quantized_decode_fp32acc_" T_NAME, gate_up_quantized_decode<T, GATED>)                           \
  INSTANTIATE(STAGE "_quantized_prefill4_fp32acc_" T_NAME, gate_up_quantized_prefill4<T, GATED>)                       \
  INSTANTIATE(STAGE "_quantized_base_fp32acc_" T_NAME, gate_up_quantized_gemm<T, GATED, BASE_ROW_TILE, BASE_TILE_N>)   \
  INSTANTIATE(STAGE "_quantized_large_batch_fp32acc_m16_" T_NAME,                                                      \
              gate_up_quantized_gemm<T, GATED, 16, LARGE_BATCH_TILE_N>)                                                \
  INSTANTIATE(STAGE "_quantized_large_batch_fp32acc_m64_" T_NAME,                                                      \
              gate_up_quantized_gemm<T, GATED, 64, LARGE_BATCH_TILE_N>)

FAMILIES("gate_up", true, float, "fp32")
FAMILIES("gate_up", true, half, "fp16")
FAMILIES("gate_up", true, bfloat, "bf16")
FAMILIES("up", false, float, "fp32")
FAMILIES("up", false, half, "fp16")
FAMILIES("up", false, bfloat, "bf16")
