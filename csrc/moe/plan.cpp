#include "plan.h"

#include "formats/matrix_code.h"
#include "moe/group.h"
#include "moe/trellis_product.h"

#include <algorithm>

namespace metal_moe {

namespace {

void check_grouping(const LayerShape& shape, uint64_t rows) {
  if (rows > GROUP_MAX_ASSIGNMENTS)
    throw std::invalid_argument("topk_ids: " + std::to_string(shape.tokens) + " tokens of " +
                                std::to_string(shape.top_k + shape.shared) + " experts each are " +
                                std::to_string(rows) + " assignments: the limit is " +
                                std::to_string(GROUP_MAX_ASSIGNMENTS));
  if (shape.experts + shape.shared > GROUP_MAX_EXPERTS)
    throw std::invalid_argument("w1: " + std::to_string(shape.experts) + " experts and " +
                                std::to_string(shape.shared) + " shared ones: the limit is " +
                                std::to_string(GROUP_MAX_EXPERTS) + " together");
}

} // namespace

TunedLayer tuned_layer(const LayerShape& shape) {
  TunedLayer layer;
  layer.hidden = shape.hidden;
  layer.intermediate = shape.intermediate;
  layer.experts = shape.experts;
  layer.top_k = shape.top_k;
  layer.dtype = shape.dtype;
  layer.quantized = shape.quantized();
  const double matrix = double(shape.hidden) * shape.intermediate;
  const double bits = shape.dtype == Dtype::Fp32 ? 32 : 16;
  const uint32_t first = shape.gated ? 2 : 1;
  const auto part_bits = [&](size_t quantized_bytes, double weights) {
    return quantized_bytes ? 8.0 * static_cast<double>(quantized_bytes) : bits * weights;
  };
  const double all =
      part_bits(shape.quantized_gate_up_bytes, first * matrix) + part_bits(shape.quantized_down_bytes, matrix);
  layer.weight_bits = matrix > 0 ? static_cast<float>(all / ((first + 1) * matrix)) : 0.0f;
  return layer;
}

ExpertsPlan plan_experts(const Tuning& tuning, Family family, const LayerShape& shape, bool fp32_accumulation) {
  const uint64_t rows = uint64_t(shape.tokens) * (shape.top_k + shape.shared);
  ExpertsPlan plan{};
  plan.shape = shape;
  plan.family = family;
  plan.fp32_accumulation = fp32_accumulation || shape.dtype != Dtype::Fp16 || shape.quantized();
  plan.grouped = family != Family::Decode;
  if (plan.grouped || shape.trellis) // rows of trellis weights may be grouped where those of the other product are not
    check_grouping(shape, rows);

  // Products with trellis weights have the smallest row tile of each family, but for what follows.
  const uint64_t routed_rows = shape.trellis ? 0 : uint64_t(shape.tokens) * shape.top_k;
  const uint32_t widest = std::max(shape.intermediate, shape.shared_intermediate);
  const bool few_tiles = rows <= PACKED_SHORT_ASSIGNMENTS;
  const bool short_gate_up = few_tiles && shape.hidden <= PACKED_SHORT_COLUMNS;
  const bool short_down = few_tiles && widest <= PACKED_SHORT_COLUMNS;
  const auto packed = [&](uint32_t row_tile, uint32_t group, bool short_rows) {
    return group ? packed_tile(row_tile, group, short_rows, tuning.threadgroup_bytes) : PackedTile{};
  };
  Tuning own = tuning;
  if (packed(PACKED_ROW_TILE, shape.packed_gate_up_group, short_gate_up).fits &&
      packed(PACKED_ROW_TILE, shape.packed_down_group, short_down).fits &&
      routed_rows <= uint64_t(PACKED_MEAN_ROWS) * shape.experts)
    own.largest_row_tile = PACKED_ROW_TILE;
  uint32_t variant = select_variant(own, family, routed_rows, shape.experts);
  const uint32_t place = quantized_variant(variant);
  if (shape.quantized())
    variant = QUANTIZED_VARIANTS[place]; // of both products: they share the row tile
  plan.variant = &VARIANTS[variant];
  plan.row_tile = family == Family::Prefill4 && !shape.trellis ? tuning.prefill4_row_tile : plan.variant->row_tile;
  // No other kernel shares these tiles.
  if (shape.trellis_alone && family == Family::LargeBatch &&
      uint64_t(shape.tokens) * shape.top_k >= uint64_t(tuning.trellis_many_rows) * shape.experts)
    plan.row_tile = TRELLIS_PRODUCT_MOST_ROWS;
  const auto kernel = [&](Stage stage, size_t quantized_bytes) {
    return quantized_bytes ? quantized_kernel(place, stage, shape.dtype)
                           : expert_kernel(variant, stage, shape.dtype, plan.fp32_accumulation);
  };
  plan.gate_up = kernel(shape.gated ? Stage::GateUp : Stage::Up, shape.quantized_gate_up_bytes);
  plan.down = kernel(Stage::Down, shape.quantized_down_bytes);
  plan.combine = combine_kernel(shape.dtype);

  plan.slots = shape.top_k + shape.shared;
  plan.rows = size_argument("tokens * (top_k + shared experts)", static_cast<int64_t>(rows));
  plan.tiles_from_ids = plan.grouped && !shape.trellis && plan.rows <= tuning.tiles_from_ids_assignments &&
                        plan.row_tile <= TILES_FROM_IDS_ROWS;
  plan.tiles = plan.grouped ? max_row_tiles(plan.rows, plan.row_tile, shape.experts + shape.shared) : 0;

  const uint32_t tile_n = plan.variant->tile_n;
  // 8 elements of any dtype are whole vectors: rows of h stay aligned.
  plan.h_row_stride = size_argument("the intermediate size", ceil_div(widest, 8) * int64_t(8));
  const PackedTile gate_up_tile = packed(plan.row_tile, shape.packed_gate_up_group, short_gate_up);
  const PackedTile down_tile = packed(plan.row_tile, shape.packed_down_group, short_down);
  const bool packs_gate_up = plan.variant->matrix && gate_up_tile.fits;
  const bool packs_down = plan.variant->matrix && down_tile.fits;
  const uint32_t gate_up_n = packs_gate_up ? gate_up_tile.threadgroup_n : tile_n;
  const uint32_t down_n = packs_down ? down_tile.threadgroup_n : tile_n;
  plan.gate_up_blocks = ceil_div(widest, plan.variant->matrix && shape.gated ? gate_up_n / 2 : gate_up_n);
  plan.down_blocks = ceil_div(shape.hidden, down_n);
  if (plan.variant->matrix) {
    const uint32_t bytes = gemm_threadgroup_bytes(
        plan.row_tile, plan.variant->stages_weights ? tile_n : 0,
        plan.variant->stages_weights && shape.dtype != Dtype::Fp32 ? tuning.threadgroup_pad_bytes : ROW_PAD_BYTES,
        tuning.threadgroup_bytes);
    plan.gate_up_bytes = packs_gate_up ? gate_up_tile.bytes : bytes;
    plan.down_bytes = packs_down ? down_tile.bytes : bytes;
  }
  bool whole_rows = false; // of gate_up, for each of its simdgroups
  if (!plan.grouped) {
    const PackedDown down = shape.packed_down_group
                                ? packed_down(shape.packed_down_group, short_down, tuning.threadgroup_bytes)
                                : PackedDown{DOWN_DECODE_SIMDGROUPS, DOWN_DECODE_COLUMNS, DOWN_DECODE_MEMORY_BYTES};
    plan.down_simdgroups = down.simdgroups;
    plan.down_blocks = ceil_div(shape.hidden, down.columns);
    plan.down_bytes = down.bytes;
    if (shape.packed_gate_up_group) {
      const auto sizes = [&](bool whole) {
        return packed_gate_up(shape.packed_gate_up_group, shape.gated ? 2 : 1, whole);
      };
      whole_rows = short_gate_up && rows * ceil_div(widest, sizes(true).columns) <= LARGE_GPU_CORES &&
                   sizes(true).bytes + down.bytes <= 2 * tuning.threadgroup_bytes;
      const PackedGateUp gate_up = sizes(whole_rows);
      plan.gate_up_simdgroups = gate_up.simdgroups;
      plan.gate_up_blocks = ceil_div(widest, gate_up.columns);
      plan.gate_up_bytes = gate_up.bytes;
    }
  }
  plan.gate_up_code_flags = (packs_gate_up && short_gate_up) || whole_rows ? CODE_SHORT_ROWS : 0;
  plan.down_code_flags = (packs_down || (!plan.grouped && shape.packed_down_group)) && short_down ? CODE_SHORT_ROWS : 0;

  const size_t item = shape.dtype == Dtype::Fp32 ? 4 : 2;
  plan.h_bytes = size_t(plan.rows) * plan.h_row_stride * item;
  plan.y_bytes = plan.grouped ? size_t(plan.rows) * shape.hidden * sizeof(float) : 0;
  const size_t chosen = std::min<uint64_t>(uint64_t(shape.tokens) * shape.top_k, shape.experts);
  plan.down_weight_bytes =
      (chosen * shape.intermediate + size_t(shape.shared) * shape.shared_intermediate) * shape.hidden * item;
  plan.gate_up_weight_bytes = plan.down_weight_bytes * (shape.gated ? 2 : 1);
  if (shape.quantized_gate_up_bytes)
    plan.gate_up_weight_bytes =
        chosen * shape.quantized_gate_up_bytes + shape.shared * shape.quantized_shared_gate_up_bytes;
  if (shape.quantized_down_bytes)
    plan.down_weight_bytes = chosen * shape.quantized_down_bytes + shape.shared * shape.quantized_shared_down_bytes;
  return plan;
}

} // namespace metal_moe
