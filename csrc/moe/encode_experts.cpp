#include "encode_experts.h"

#include "encode_group.h"
#include "encode_trellis_experts.h"

#include "../core/trace.h"
#include "moe/combine.h"
#include "moe/group.h"

#include <algorithm>

namespace metal_moe {

namespace {

/// Whether every row of a [rows..., K] tensor starts at a multiple of VECTOR_BYTES.
bool rows_aligned(const TensorView& tensor, uint64_t row_stride) {
  return tensor.address % VECTOR_BYTES == 0 && row_stride * tensor.item_size % VECTOR_BYTES == 0;
}

/// Both matrix products of a layer: whether kernels may read whole vectors without edge handling.
struct Vectorized {
  bool gate_up;
  bool down;
};

Vectorized vectorized(const TensorView& x, const ExpertsLayer& layer, const LayerShape& shape, uint32_t x_row_stride) {
  const bool shared = shape.shared > 0;
  return {shape.hidden % 8 == 0 && rows_aligned(x, x_row_stride) &&
              (layer.gate || rows_aligned(layer.w1, shape.hidden)) &&
              (!shared || rows_aligned(layer.shared_w1, shape.hidden)),
          shape.intermediate % 8 == 0 && (layer.down || rows_aligned(layer.w2, shape.intermediate)) &&
              (!shared ||
               (shape.shared_intermediate % 8 == 0 && rows_aligned(layer.shared_w2, shape.shared_intermediate)))};
}

/// Kernels of quantised weights read x, codes, scales and biases in vectors, from addresses that the caller sees to.
void check_quantized(const TensorView& x, const ExpertsLayer& layer, uint32_t x_row_stride) {
  check_alignment("w1", layer.gate);
  check_alignment("w1", layer.up);
  check_alignment("w2", layer.down);
  check_alignment("shared_w1", layer.shared_gate);
  check_alignment("shared_w1", layer.shared_up);
  check_alignment("shared_w2", layer.shared_down);
  if (layer.gate && !rows_aligned(x, x_row_stride))
    throw std::invalid_argument("hidden_states has rows that do not start at multiples of " +
                                std::to_string(VECTOR_BYTES) + " bytes: must be aligned where w1 is quantised");
}

/// Why `simd` cannot run a layer that is not vectorised.
[[noreturn]] void throw_unaligned(const TensorView& x, const ExpertsLayer& layer, const LayerShape& shape,
                                  uint32_t x_row_stride) {
  std::string problem;
  const auto size = [&](const char* argument, const char* name, uint32_t value) {
    if (problem.empty() && value % 8 != 0)
      problem = std::string(argument) + " has " + name + " = " + std::to_string(value) + ", not a multiple of 8";
  };
  const auto rows = [&](const char* argument, const TensorView& tensor, uint64_t row_stride) {
    if (problem.empty() && !rows_aligned(tensor, row_stride))
      problem = std::string(argument) + " has rows that do not start at multiples of " + std::to_string(VECTOR_BYTES) +
                " bytes";
  };
  size("hidden_states", "H", shape.hidden);
  size("w2", "I", shape.intermediate);
  if (shape.shared > 0)
    size("shared_w2", "I", shape.shared_intermediate);
  rows("hidden_states", x, x_row_stride);
  rows("w1", layer.w1, shape.hidden);
  rows("w2", layer.w2, shape.intermediate);
  if (shape.shared > 0) {
    rows("shared_w1", layer.shared_w1, shape.hidden);
    rows("shared_w2", layer.shared_w2, shape.shared_intermediate);
  }
  throw std::invalid_argument("kernel is 'moe_simd', but " + problem);
}

/// What the dispatches of a layer have in common.
struct Encoding {
  CommandStream& stream;
  MoeEngine& engine;
  const ExpertsPlan& plan;
  const TensorView& x;
  const ExpertsLayer& layer;
  const SlotsView& ids;
  const SlotsView& weights;
  SlotsView shared_weights;
  const TensorView& out;
  Vectorized vectorized;
  ExpertsArgs args;

  void decode();
  void grouped();

  /// Bind from index 1 on; the first index that is free.
  uint32_t gate_up_weights();
  uint32_t down_weights();
  uint32_t bind_part(uint32_t index, const QuantizedPart& part);
  /// `view`, or where it is absent any buffer: every argument of a kernel must be bound.
  BufferView or_any(const TensorView& view) const { return view ? view.view() : x.view(); }
  /// Columns of a simdgroup in the GEMV families; down: in prefill4.
  uint32_t gate_up_columns() const { return layer.gate ? QUANTIZED_COLUMNS : GATE_UP_COLUMNS; }
  uint32_t down_columns() const { return layer.down ? QUANTIZED_COLUMNS : DOWN_PREFILL4_COLUMNS; }
  uint32_t widest_intermediate() const { return std::max(plan.shape.intermediate, plan.shape.shared_intermediate); }
  size_t activation_bytes() const { return size_t(plan.rows) * plan.shape.hidden * x.item_size + plan.h_bytes; }
};

uint32_t Encoding::bind_part(uint32_t index, const QuantizedPart& part) {
  for (const TensorView* buffer : {&part.codes, &part.scales, &part.biases, &part.table})
    stream.bind(index++, or_any(*buffer));
  return index;
}

uint32_t Encoding::gate_up_weights() {
  uint32_t index = 1;
  if (layer.gate) {
    for (const QuantizedPart* part : {&layer.gate, &layer.up, &layer.shared_gate, &layer.shared_up})
      index = bind_part(index, *part);
  } else {
    stream.bind(index++, layer.w1.view());
    stream.bind(index++, or_any(layer.shared_w1));
  }
  stream.bind(index++, or_any(layer.bias1));
  args.has_bias = bool(layer.bias1);
  args.vectorized = vectorized.gate_up;
  return index;
}

uint32_t Encoding::down_weights() {
  uint32_t index = 1;
  if (layer.down) {
    index = bind_part(bind_part(index, layer.down), layer.shared_down);
  } else {
    stream.bind(index++, layer.w2.view());
    stream.bind(index++, or_any(layer.shared_w2));
  }
  stream.bind(index++, or_any(layer.bias2));
  args.has_bias = bool(layer.bias2);
  args.vectorized = vectorized.down;
  return index;
}

/// Threadgroups for `columns` output columns in a GEMV family whose simdgroups take `per_simdgroup` each.
uint32_t gemv_blocks(const Pipeline& pipeline, uint32_t columns, uint32_t per_simdgroup) {
  return ceil_div(columns, gemv_threadgroup_columns(GEMV_SIMDGROUPS * per_simdgroup, pipeline.simd_width));
}

/// What these pipelines were compiled for.
void record_codes(const Pipeline& gate_up, const Pipeline& down) {
  const auto& first = gate_up.constants.values;
  last_dispatch().codes = {first[0], first[1], down.constants.values[0]};
}

void Encoding::decode() {
  const LayerShape& shape = plan.shape;
  const BufferView h = stream.scratch(plan.h_bytes);

  const Pipeline& gate_up = engine.pipeline(plan.gate_up, {{layer.gate.code, layer.up.code}});
  stream.use(gate_up);
  stream.bind(0, x.view());
  uint32_t index = gate_up_weights();
  stream.bind(index++, ids.view);
  stream.bind(index++, h);
  stream.bind_value(index, args);
  stream.dispatch(MTL::Size(gemv_blocks(gate_up, widest_intermediate(), gate_up_columns()), plan.slots, shape.tokens),
                  simdgroups(GEMV_SIMDGROUPS, gate_up.simd_width) * gate_up.simd_width,
                  plan.gate_up_weight_bytes + activation_bytes());

  const Pipeline& down = engine.pipeline(plan.down, {{layer.down.code}});
  record_codes(gate_up, down);
  stream.use(down);
  stream.bind(0, h);
  index = down_weights();
  stream.bind(index++, ids.view);
  stream.bind(index++, weights.view);
  stream.bind(index++, shared_weights.view);
  stream.bind(index++, out.view());
  stream.bind_value(index, args);
  stream.threadgroup_memory(0, DOWN_DECODE_MEMORY_BYTES);
  const uint32_t columns = gemv_threadgroup_columns(DOWN_DECODE_COLUMNS, down.simd_width);
  stream.dispatch(MTL::Size(ceil_div(shape.hidden, columns), shape.tokens, 1),
                  simdgroups(DOWN_DECODE_SIMDGROUPS, down.simd_width) * down.simd_width,
                  plan.down_weight_bytes + activation_bytes());
}

void Encoding::grouped() {
  const LayerShape& shape = plan.shape;
  GroupTables tables;
  tables.offsets = stream.scratch((size_t(shape.experts) + shape.shared + 1) * sizeof(uint32_t));
  tables.sorted_rows = stream.scratch(size_t(plan.rows) * sizeof(uint32_t));
  tables.inverse = stream.scratch(size_t(plan.rows) * sizeof(uint32_t));
  tables.tiles = stream.scratch(size_t(plan.tiles) * sizeof(RowTile));
  tables.max_tiles = plan.tiles;
  encode_group(stream, engine, ids, shape.tokens, shape.top_k, shape.experts, shape.shared, plan.row_tile, tables);

  const bool gemv = plan.family == Family::Prefill4;
  const uint32_t wanted_simdgroups = gemv ? GEMV_SIMDGROUPS : GEMM_SIMDGROUPS;
  const BufferView h = stream.scratch(plan.h_bytes);
  const Pipeline& gate_up = engine.pipeline(plan.gate_up, {{layer.gate.code, layer.up.code}});
  const uint32_t threads = simdgroups(wanted_simdgroups, gate_up.simd_width) * gate_up.simd_width;
  stream.use(gate_up);
  stream.bind(0, x.view());
  uint32_t index = gate_up_weights();
  stream.bind(index++, tables.sorted_rows);
  stream.bind(index++, tables.tiles);
  stream.bind(index++, h);
  stream.bind_value(index, args);
  if (plan.threadgroup_bytes)
    stream.threadgroup_memory(0, plan.threadgroup_bytes);
  stream.dispatch(MTL::Size(plan.tiles,
                            gemv ? gemv_blocks(gate_up, widest_intermediate(), gate_up_columns()) : plan.gate_up_blocks,
                            1),
                  threads, plan.gate_up_weight_bytes + activation_bytes());

  const BufferView y = stream.scratch(plan.y_bytes);
  args.out_row_stride = shape.hidden;
  const Pipeline& down = engine.pipeline(plan.down, {{layer.down.code}});
  record_codes(gate_up, down);
  stream.use(down);
  stream.bind(0, h);
  index = down_weights();
  stream.bind(index++, tables.tiles);
  stream.bind(index++, y);
  stream.bind_value(index, args);
  if (plan.threadgroup_bytes)
    stream.threadgroup_memory(0, plan.threadgroup_bytes);
  stream.dispatch(
      MTL::Size(plan.tiles, gemv ? gemv_blocks(gate_up, shape.hidden, down_columns()) : plan.down_blocks, 1), threads,
      plan.down_weight_bytes + plan.h_bytes + plan.y_bytes);

  CombineArgs combine{};
  combine.tokens = shape.tokens;
  combine.hidden = shape.hidden;
  combine.top_k = shape.top_k;
  combine.shared = shape.shared;
  combine.weights_token_stride = weights.token_stride;
  combine.weights_slot_stride = weights.slot_stride;
  combine.weights_type = weights.type;
  combine.has_shared_weights = args.has_shared_weights;
  combine.shared_token_stride = shared_weights.token_stride;
  combine.shared_slot_stride = shared_weights.slot_stride;
  combine.shared_type = shared_weights.type;
  combine.out_row_stride = shape.hidden;
  combine.vectorized = shape.hidden % COMBINE_COLUMNS == 0 && out.address % VECTOR_BYTES == 0;
  const Pipeline& pipeline = engine.pipeline(plan.combine);
  const uint32_t combine_threads = simdgroups(COMBINE_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width;
  stream.use(pipeline);
  stream.bind(0, y);
  stream.bind(1, tables.inverse);
  stream.bind(2, weights.view);
  stream.bind(3, shared_weights.view);
  stream.bind(4, out.view());
  stream.bind_value(5, combine);
  // A one-thread simdgroup takes a whole row: splitting it would only split a loop that the compiler vectorises.
  const uint32_t column_blocks =
      pipeline.simd_width == 1 ? 1 : ceil_div(shape.hidden, combine_threads * COMBINE_COLUMNS);
  stream.dispatch(MTL::Size(column_blocks, shape.tokens, 1), combine_threads,
                  plan.y_bytes + size_t(shape.tokens) * shape.hidden * x.item_size);
}

} // namespace

namespace {

/// Of one expert.
size_t part_bytes(const QuantizedPart& part) {
  size_t bytes = 0;
  for (const TensorView* buffer : {&part.codes, &part.scales, &part.biases})
    bytes += *buffer ? static_cast<size_t>(buffer->shape[0]) : 0;
  return part ? std::max<size_t>(bytes / static_cast<size_t>(part.table.shape[0]), 1) : 0;
}

} // namespace

void check_alignment(const char* argument, const QuantizedPart& part) {
  const auto check = [&](const char* name, const TensorView& buffer) {
    if (buffer && buffer.address % VECTOR_BYTES != 0)
      throw std::invalid_argument(std::string(argument) + " has " + name + " at an address that is " +
                                  std::to_string(buffer.address % VECTOR_BYTES) + " beyond a multiple of " +
                                  std::to_string(VECTOR_BYTES) + ": must be aligned, see QuantizedExperts.aligned()");
  };
  check("codes", part.codes);
  check("scales", part.scales);
  check("biases", part.biases);
  check("a table", part.table);
}

LayerShape layer_shape(const TensorView& x, const ExpertsLayer& layer, int64_t top_k) {
  LayerShape shape;
  shape.tokens = size_argument("tokens of hidden_states", x.shape[0]);
  shape.hidden = size_argument("hidden size of hidden_states", x.shape[1]);
  shape.experts = size_argument("experts of w2", layer.down ? layer.down.table.shape[0] : layer.w2.shape[0]);
  shape.intermediate = layer.down ? layer.intermediate : size_argument("intermediate size of w2", layer.w2.shape[2]);
  shape.top_k = size_argument("top_k", top_k);
  if (layer.shared_down) {
    shape.shared = size_argument("experts of shared_w2", layer.shared_down.table.shape[0]);
    shape.shared_intermediate = layer.shared_intermediate;
  } else if (layer.shared_w2) {
    shape.shared = size_argument("experts of shared_w2", layer.shared_w2.shape[0]);
    shape.shared_intermediate = size_argument("intermediate size of shared_w2", layer.shared_w2.shape[2]);
  }
  shape.dtype = x.dtype;
  shape.gated = layer.activation != ACTIVATION_RELU2;
  shape.quantized_gate_up_bytes = part_bytes(layer.gate) + part_bytes(layer.up);
  shape.quantized_down_bytes = part_bytes(layer.down);
  shape.quantized_shared_gate_up_bytes = part_bytes(layer.shared_gate) + part_bytes(layer.shared_up);
  shape.quantized_shared_down_bytes = part_bytes(layer.shared_down);
  return shape;
}

ExpertsPacking pack_experts(const MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                            const SlotsView& ids, const SlotsView& weights, uint32_t top_k) {
  const LayerShape shape = layer_shape(x, layer, top_k);
  const bool fp32_accumulation = layer.fp32_accumulation || shape.dtype != Dtype::Fp16 || shape.quantized();
  const Tuning& tuning = engine.tuning(tuned_layer(shape));
  const Family family =
      layer.family ? parse_family(*layer.family, fp32_accumulation) : select_family(tuning, shape.tokens);
  ExpertsPacking packing{};
  if (shape.tokens == 0)
    return packing;
  const ExpertsPlan& plan = packing.plan = plan_experts(tuning, family, shape, fp32_accumulation);

  ExpertsArgs& args = packing.args;
  args.tokens = shape.tokens;
  args.hidden = shape.hidden;
  args.intermediate = shape.intermediate;
  args.shared_intermediate = shape.shared_intermediate;
  args.experts = shape.experts;
  args.shared = shape.shared;
  args.top_k = shape.top_k;
  // One row has no stride of its own: the row length keeps it aligned.
  args.x_row_stride = shape.tokens > 1 ? size_argument("row stride of hidden_states", x.strides[0]) : shape.hidden;
  args.h_row_stride = plan.h_row_stride;
  args.out_row_stride = shape.hidden;
  args.ids_token_stride = ids.token_stride;
  args.ids_slot_stride = ids.slot_stride;
  args.id_words = ids.type;
  args.weights_token_stride = weights.token_stride;
  args.weights_slot_stride = weights.slot_stride;
  args.weights_type = weights.type;
  if (layer.shared_weights) {
    args.has_shared_weights = 1;
    args.shared_token_stride = stride_argument("token stride of shared_weights", layer.shared_weights, 0);
    args.shared_slot_stride = stride_argument("slot stride of shared_weights", layer.shared_weights, 1);
    args.shared_type = static_cast<uint32_t>(layer.shared_weights.dtype);
  }
  args.interleaved = layer.interleaved;
  args.activation = layer.activation;
  args.alpha = layer.alpha;
  args.limit = layer.limit;
  return packing;
}

void encode_experts(CommandStream& stream, MoeEngine& engine, const ExpertsPacking& packing, const TensorView& x,
                    const ExpertsLayer& layer, const SlotsView& ids, const SlotsView& weights, const TensorView& out) {
  const ExpertsPlan& plan = packing.plan;
  const ExpertsArgs& args = packing.args;
  const LayerShape& shape = plan.shape;
  if (shape.tokens == 0)
    return;
  const Vectorized aligned = vectorized(x, layer, shape, args.x_row_stride);
  if (shape.quantized())
    check_quantized(x, layer, args.x_row_stride);
  else if (plan.family == Family::Simd && !(aligned.gate_up && aligned.down))
    throw_unaligned(x, layer, shape, args.x_row_stride);

  DispatchTrace& trace = last_dispatch();
  trace.family = family_name(plan.family, plan.fp32_accumulation);
  trace.row_tile = plan.row_tile;
  trace.tile_n = plan.variant->tile_n;
  trace.vectorized = aligned.gate_up && aligned.down;
  trace.activation = layer.activation;
  if (!trace.vectorized)
    count(Fallback::UnalignedRows);
  if (plan.fp32_accumulation && !layer.fp32_accumulation)
    count(Fallback::NoFp16Sums);
  if (shape.quantized() && plan.family == Family::Simd)
    count(Fallback::NoQuantizedSimd);

  const SlotsView shared_weights{layer.shared_weights ? layer.shared_weights.view() : weights.view,
                                 args.shared_token_stride, args.shared_slot_stride, args.shared_type};
  Encoding encoding{stream, engine, plan, x, layer, ids, weights, shared_weights, out, aligned, args};
  if (plan.grouped)
    encoding.grouped();
  else
    encoding.decode();
}

void encode_experts(CommandStream& stream, MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                    const SlotsView& ids, const SlotsView& weights, uint32_t top_k, const TensorView& out) {
  if (layer.trellis)
    return encode_trellis_experts(stream, engine, x, layer, ids, weights, top_k, out);
  encode_experts(stream, engine, pack_experts(engine, x, layer, ids, weights, top_k), x, layer, ids, weights, out);
}

} // namespace metal_moe
