#include "experts_encoding.h"

#include "../core/trace.h"
#include "formats/matrix_code.h"
#include "moe/combine.h"
#include "moe/group.h"

namespace metal_moe {

namespace {

/// Threadgroups for `columns` output columns in a GEMV family whose simdgroups take `per_simdgroup` each.
uint32_t gemv_blocks(const Pipeline& pipeline, uint32_t columns, uint32_t per_simdgroup) {
  return ceil_div(columns, gemv_threadgroup_columns(GEMV_SIMDGROUPS * per_simdgroup, pipeline.simd_width));
}

/// What a product's pipeline was compiled for.
void record_gate_up_codes(const Pipeline& pipeline) {
  for (size_t i = 0; i < 2; ++i)
    last_dispatch().codes[i] = pipeline.constants.values[i] & ~CODE_SHORT_ROWS;
}
void record_down_code(const Pipeline& pipeline) {
  last_dispatch().codes[2] = pipeline.constants.values[0] & ~CODE_SHORT_ROWS;
}

} // namespace

GroupTables encode_plan_group(CommandStream& stream, MoeEngine& engine, const ExpertsPlan& plan, const SlotsView& ids,
                              uint32_t row_tile) {
  const LayerShape& shape = plan.shape;
  const uint32_t experts = shape.experts + shape.shared;
  GroupTables tables;
  tables.max_tiles = max_row_tiles(plan.rows, row_tile, experts);
  tables.offsets = stream.scratch((size_t(experts) + 1) * sizeof(uint32_t));
  tables.sorted_rows = stream.scratch(size_t(plan.rows) * sizeof(uint32_t));
  tables.inverse = stream.scratch(size_t(plan.rows) * sizeof(uint32_t));
  tables.tiles = stream.scratch(size_t(tables.max_tiles) * sizeof(RowTile));
  encode_group(stream, engine, ids, shape.tokens, shape.top_k, shape.experts, shape.shared, row_tile, tables);
  return tables;
}

uint32_t ExpertsEncoding::bind_part(uint32_t index, const QuantizedPart& part) {
  for (const TensorView* buffer : {&part.codes, &part.scales, &part.biases, &part.table})
    stream.bind(index++, or_any(*buffer));
  return index;
}

uint32_t ExpertsEncoding::gate_up_weights() {
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

uint32_t ExpertsEncoding::down_weights() {
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

FunctionConstants ExpertsEncoding::gate_up_codes() const {
  return {{layer.gate.code | plan.gate_up_code_flags, layer.up.code | plan.gate_up_code_flags}};
}

void ExpertsEncoding::gate_up_decode(const BufferView& h) {
  const LayerShape& shape = plan.shape;
  const Pipeline& pipeline = engine.pipeline(plan.gate_up, gate_up_codes());
  record_gate_up_codes(pipeline);
  stream.use(pipeline);
  stream.bind(0, x.view());
  uint32_t index = gate_up_weights();
  stream.bind(index++, ids.view);
  stream.bind(index++, h);
  stream.bind_value(index, args);
  if (layer.gate)
    stream.threadgroup_memory(0, std::max(plan.gate_up_bytes, VECTOR_BYTES));
  const bool packed = plan.gate_up_bytes > 0;
  const uint32_t blocks =
      packed ? plan.gate_up_blocks : gemv_blocks(pipeline, widest_intermediate(), gate_up_columns());
  stream.dispatch(MTL::Size(blocks, plan.slots, shape.tokens),
                  simdgroups(packed ? plan.gate_up_simdgroups : GEMV_SIMDGROUPS, pipeline.simd_width) *
                      pipeline.simd_width,
                  plan.gate_up_weight_bytes + activation_bytes());
}

void ExpertsEncoding::down_decode(const BufferView& h) {
  const LayerShape& shape = plan.shape;
  const Pipeline& pipeline = engine.pipeline(plan.down, {{layer.down.code | plan.down_code_flags}});
  record_down_code(pipeline);
  stream.use(pipeline);
  stream.bind(0, h);
  uint32_t index = down_weights();
  stream.bind(index++, ids.view);
  stream.bind(index++, weights.view);
  stream.bind(index++, shared_weights.view);
  stream.bind(index++, out.view());
  stream.bind_value(index, args);
  stream.threadgroup_memory(0, plan.down_bytes);
  const uint32_t blocks = pipeline.simd_width == 1 ? ceil_div(shape.hidden, GEMV_TILE_N) : plan.down_blocks;
  stream.dispatch(MTL::Size(blocks, shape.tokens, 1),
                  simdgroups(plan.down_simdgroups, pipeline.simd_width) * pipeline.simd_width,
                  plan.down_weight_bytes + activation_bytes());
}

MTL::Size ExpertsEncoding::grouped_grid(uint32_t blocks, uint32_t code_flags) const {
  return code_short_rows(code_flags) ? MTL::Size(blocks, plan.tiles, 1) : MTL::Size(plan.tiles, blocks, 1);
}

void ExpertsEncoding::gate_up_grouped(const GroupTables& tables, const BufferView& h) {
  args.tiles_from_ids = plan.tiles_from_ids;
  const bool gemv = plan.family == Family::Prefill4;
  const Pipeline& pipeline = engine.pipeline(plan.gate_up, gate_up_codes());
  record_gate_up_codes(pipeline);
  stream.use(pipeline);
  stream.bind(0, x.view());
  uint32_t index = gate_up_weights();
  stream.bind(index++, ids.view);
  stream.bind(index++, or_ids(tables.sorted_rows));
  stream.bind(index++, or_ids(tables.tiles));
  stream.bind(index++, h);
  stream.bind_value(index, args);
  if (plan.gate_up_bytes)
    stream.threadgroup_memory(0, plan.gate_up_bytes);
  const uint32_t blocks = gemv ? gemv_blocks(pipeline, widest_intermediate(), gate_up_columns()) : plan.gate_up_blocks;
  stream.dispatch(grouped_grid(blocks, plan.gate_up_code_flags),
                  simdgroups(gemv ? GEMV_SIMDGROUPS : GEMM_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width,
                  plan.gate_up_weight_bytes + activation_bytes());
}

void ExpertsEncoding::down_grouped(const GroupTables& tables, const BufferView& h) {
  const LayerShape& shape = plan.shape;
  const BufferView y = stream.scratch(plan.y_bytes);
  args.tiles_from_ids = plan.tiles_from_ids;
  args.out_row_stride = shape.hidden;
  const bool gemv = plan.family == Family::Prefill4;
  const Pipeline& pipeline = engine.pipeline(plan.down, {{layer.down.code | plan.down_code_flags}});
  record_down_code(pipeline);
  stream.use(pipeline);
  stream.bind(0, h);
  uint32_t index = down_weights();
  stream.bind(index++, ids.view);
  stream.bind(index++, or_ids(tables.tiles));
  stream.bind(index++, y);
  stream.bind_value(index, args);
  if (plan.down_bytes)
    stream.threadgroup_memory(0, plan.down_bytes);
  const uint32_t blocks = gemv ? gemv_blocks(pipeline, shape.hidden, down_columns()) : plan.down_blocks;
  stream.dispatch(grouped_grid(blocks, plan.down_code_flags),
                  simdgroups(gemv ? GEMV_SIMDGROUPS : GEMM_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width,
                  plan.down_weight_bytes + plan.h_bytes + plan.y_bytes);
  combine(tables, y);
}

void ExpertsEncoding::combine(const GroupTables& tables, const BufferView& y) {
  const LayerShape& shape = plan.shape;
  CombineArgs combined{};
  combined.tokens = shape.tokens;
  combined.hidden = shape.hidden;
  combined.experts = shape.experts;
  combined.top_k = shape.top_k;
  combined.shared = shape.shared;
  combined.rows_by_assignment = plan.tiles_from_ids;
  combined.ids_token_stride = ids.token_stride;
  combined.ids_slot_stride = ids.slot_stride;
  combined.id_words = ids.type;
  combined.weights_token_stride = weights.token_stride;
  combined.weights_slot_stride = weights.slot_stride;
  combined.weights_type = weights.type;
  combined.has_shared_weights = args.has_shared_weights;
  combined.shared_token_stride = shared_weights.token_stride;
  combined.shared_slot_stride = shared_weights.slot_stride;
  combined.shared_type = shared_weights.type;
  combined.out_row_stride = shape.hidden;
  combined.vectorized = shape.hidden % COMBINE_COLUMNS == 0 && out.address % VECTOR_BYTES == 0;
  const Pipeline& pipeline = engine.pipeline(plan.combine);
  const uint32_t combine_threads = simdgroups(COMBINE_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width;
  stream.use(pipeline);
  stream.bind(0, y);
  stream.bind(1, or_ids(tables.inverse));
  stream.bind(2, ids.view);
  stream.bind(3, weights.view);
  stream.bind(4, shared_weights.view);
  stream.bind(5, out.view());
  stream.bind_value(6, combined);
  // A one-thread simdgroup takes a whole row: splitting it would only split a loop that the compiler vectorises.
  const uint32_t column_blocks =
      pipeline.simd_width == 1 ? 1 : ceil_div(shape.hidden, combine_threads * COMBINE_COLUMNS);
  stream.dispatch(MTL::Size(column_blocks, shape.tokens, 1), combine_threads,
                  plan.y_bytes + size_t(shape.tokens) * shape.hidden * x.item_size);
}

} // namespace metal_moe
