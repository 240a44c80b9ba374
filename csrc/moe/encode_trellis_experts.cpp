#include "encode_trellis_experts.h"

#include "encode_group.h"

#include "../core/trace.h"
#include "moe/group.h"
#include "moe/rotate.h"
#include "moe/trellis_decode.h"
#include "moe/trellis_product.h"

#include <algorithm>
#include <array>

namespace metal_moe {

namespace {

/// How a product divides its inputs; one after the other sums are formed from.
struct Slices {
  uint32_t blocks; // of 128 inputs, of each
  uint32_t count;
};

/// For `inputs` inputs, where one slice of them would make `threadgroups`. One-thread simdgroups need no more of those.
Slices decode_slices(uint32_t inputs, uint32_t threadgroups, uint32_t simd_width) {
  const uint32_t blocks = rotate_blocks(inputs), least = ceil_div(blocks, TRELLIS_DECODE_MAX_BLOCKS);
  const uint32_t wanted =
      simd_width == 1 ? 1 : std::min(ceil_div(TRELLIS_DECODE_THREADGROUPS, threadgroups), TRELLIS_DECODE_SLICES);
  const uint32_t each = ceil_div(blocks, std::clamp(wanted, least, blocks));
  return {each, ceil_div(blocks, each)};
}

/// What the dispatches have in common.
struct Encoding {
  CommandStream& stream;
  MoeEngine& engine;
  const TensorView& x;
  const ExpertsLayer& layer;
  const SlotsView& ids;
  const SlotsView& weights;
  const TensorView& out;
  uint32_t tokens;
  uint32_t matrices; // of the first product: gate and up, or one
  RotateArgs args;

  void decode();
  void grouped();

private:
  void gate_up_decode(const Pipeline& pipeline, const BufferView& h, Slices slices);
  void down_decode(const Pipeline& pipeline, const BufferView& h, uint32_t h_slices, const BufferView& y,
                   Slices slices);
  /// Rows fp32 [matrices, S, outputs] = rows of `from` fp32 [matrices, S, inputs] times the experts' tiles.
  void product(const GroupTables& tables, const QuantizedPart& first, const QuantizedPart& second, uint32_t count,
               uint32_t inputs, uint32_t outputs, const BufferView& from, const BufferView& to);
  void rotate(KernelIndex kernel, uint32_t columns, uint32_t rows, uint32_t count, size_t bytes);
  void rotate_outputs(const BufferView& y, uint32_t slices);
  /// Slices of a product of `count` matrices, `outputs` columns each.
  Slices slices(const Pipeline& pipeline, uint32_t inputs, uint32_t outputs, uint32_t count) const;
  void dispatch_decode(const Pipeline& pipeline, uint32_t outputs, uint32_t count, Slices slices, size_t bytes);
  /// What the pipeline of a product was compiled for.
  void record_codes(const Pipeline& pipeline, bool down) const;

  const QuantizedPart& up_or_gate() const { return layer.up ? layer.up : layer.gate; }
  BufferView or_any(const TensorView& view) const { return view ? view.view() : layer.gate.table.view(); }
  size_t row_bytes(uint32_t columns, uint32_t count) const {
    return size_t(count) * args.rows * rotate_padded(columns) * sizeof(float);
  }
  /// Records are not read here: codes as if all experts in use were as large as the average one.
  size_t code_bytes(const QuantizedPart& part) const {
    return size_t(part.codes.shape[0]) / args.experts * std::min(args.rows, args.experts);
  }
};

void Encoding::record_codes(const Pipeline& pipeline, bool down) const {
  std::array<uint32_t, 3>& compiled_for = last_dispatch().codes;
  if (down)
    compiled_for[2] = pipeline.constants.values[0];
  else
    std::copy_n(pipeline.constants.values.begin(), matrices, compiled_for.begin());
}

Slices Encoding::slices(const Pipeline& pipeline, uint32_t inputs, uint32_t outputs, uint32_t count) const {
  const uint32_t width = pipeline.simd_width;
  return decode_slices(inputs, ceil_div(rotate_padded(outputs), trellis_decode_columns(width)) * args.rows * count,
                       width);
}

/// The dispatch of a decode kernel whose buffers are bound.
void Encoding::dispatch_decode(const Pipeline& pipeline, uint32_t outputs, uint32_t count, Slices slices,
                               size_t bytes) {
  const uint32_t width = pipeline.simd_width;
  stream.threadgroup_memory(0, rotated_row_bytes(slices.blocks));
  stream.dispatch(
      MTL::Size(ceil_div(rotate_padded(outputs), trellis_decode_columns(width)), args.rows, count * slices.count),
      simdgroups(TRELLIS_DECODE_SIMDGROUPS, width) * width, bytes);
}

void Encoding::gate_up_decode(const Pipeline& pipeline, const BufferView& h, Slices slices) {
  record_codes(pipeline, false);
  stream.use(pipeline);
  stream.bind(0, x.view());
  stream.bind(1, ids.view);
  stream.bind(2, layer.gate.codes.view());
  stream.bind(3, layer.gate.scales.view());
  stream.bind(4, layer.gate.table.view());
  stream.bind(5, up_or_gate().codes.view());
  stream.bind(6, up_or_gate().scales.view());
  stream.bind(7, up_or_gate().table.view());
  stream.bind(8, h);
  stream.bind_value(9, TrellisDecodeArgs{args, slices.blocks});
  const size_t codes = code_bytes(layer.gate) + (layer.up ? code_bytes(layer.up) : 0);
  dispatch_decode(pipeline, args.intermediate, matrices, slices,
                  codes + slices.count * row_bytes(args.intermediate, matrices));
}

void Encoding::down_decode(const Pipeline& pipeline, const BufferView& h, uint32_t h_slices, const BufferView& y,
                           Slices slices) {
  RotateArgs rotate = args;
  rotate.slices = h_slices;
  record_codes(pipeline, true);
  stream.use(pipeline);
  stream.bind(0, h);
  stream.bind(1, ids.view);
  stream.bind(2, or_any(layer.bias1));
  stream.bind(3, layer.gate.biases.view());
  stream.bind(4, layer.gate.table.view());
  stream.bind(5, up_or_gate().biases.view());
  stream.bind(6, up_or_gate().table.view());
  stream.bind(7, layer.down.codes.view());
  stream.bind(8, layer.down.scales.view());
  stream.bind(9, layer.down.table.view());
  stream.bind(10, y);
  stream.bind_value(11, TrellisDecodeArgs{rotate, slices.blocks});
  dispatch_decode(pipeline, args.hidden, 1, slices,
                  code_bytes(layer.down) + h_slices * row_bytes(args.intermediate, matrices) +
                      slices.count * row_bytes(args.hidden, 1));
}

void Encoding::decode() {
  const Pipeline& gate_up = engine.pipeline(TRELLIS_GATE_UP_DECODE_KERNEL, {{layer.gate.code, up_or_gate().code}});
  const Pipeline& down = engine.pipeline(TRELLIS_DOWN_DECODE_KERNEL, {{layer.down.code}});
  const Slices first = slices(gate_up, args.hidden, args.intermediate, matrices);
  const Slices second = slices(down, args.intermediate, args.hidden, 1);
  const BufferView h = stream.scratch(first.count * row_bytes(args.intermediate, matrices));
  const BufferView y = stream.scratch(second.count * row_bytes(args.hidden, 1));
  gate_up_decode(gate_up, h, first);
  down_decode(down, h, first.count, y, second);
  rotate_outputs(y, second.count);
}

/// The dispatch of a kernel whose arguments are bound.
void Encoding::rotate(KernelIndex kernel, uint32_t columns, uint32_t rows, uint32_t count, size_t bytes) {
  const Pipeline& pipeline = engine.pipeline(kernel);
  const uint32_t per_threadgroup = simdgroups(ROTATE_SIMDGROUPS, pipeline.simd_width);
  stream.dispatch(MTL::Size(ceil_div(rotate_blocks(columns), per_threadgroup), rows, count),
                  per_threadgroup * pipeline.simd_width, bytes);
}

void Encoding::product(const GroupTables& tables, const QuantizedPart& first, const QuantizedPart& second,
                       uint32_t count, uint32_t inputs, uint32_t outputs, const BufferView& from,
                       const BufferView& to) {
  const Pipeline& pipeline = engine.pipeline(TRELLIS_PRODUCT_M4_KERNEL, {{first.code, second.code}});
  record_codes(pipeline, &first == &layer.down);
  const TrellisProductArgs product{args.rows, rotate_padded(inputs), rotate_padded(outputs)};
  stream.use(pipeline);
  stream.bind(0, from);
  stream.bind(1, first.codes.view());
  stream.bind(2, first.table.view());
  stream.bind(3, second.codes.view());
  stream.bind(4, second.table.view());
  stream.bind(5, tables.sorted_rows);
  stream.bind(6, tables.tiles);
  stream.bind(7, to);
  stream.bind_value(8, product);
  stream.threadgroup_memory(0, trellis_product_memory(TRELLIS_PRODUCT_ROWS));
  const uint32_t columns = TRELLIS_TILE * trellis_product_tiles(pipeline.simd_width);
  stream.dispatch(MTL::Size(product.outputs / columns, tables.max_tiles, count),
                  simdgroups(TRELLIS_PRODUCT_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width,
                  count * code_bytes(first) + row_bytes(inputs, count) + row_bytes(outputs, count));
}

void Encoding::rotate_outputs(const BufferView& y, uint32_t slices) {
  const Pipeline& pipeline = engine.pipeline(ROTATE_OUTPUTS_KERNEL);
  RotateArgs rotate = args;
  rotate.slices = slices;
  stream.use(pipeline);
  stream.bind(0, y);
  stream.bind(1, ids.view);
  stream.bind(2, weights.view);
  stream.bind(3, or_any(layer.bias2));
  stream.bind(4, layer.down.biases.view());
  stream.bind(5, layer.down.table.view());
  stream.bind(6, out.view());
  stream.bind_value(7, rotate);
  stream.threadgroup_memory(0, ROTATE_OUTPUT_BYTES);
  stream.dispatch(MTL::Size(rotate_blocks(args.hidden), tokens, 1),
                  simdgroups(ROTATE_OUTPUT_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width,
                  slices * row_bytes(args.hidden, 1));
}

void Encoding::grouped() {
  GroupTables tables;
  const uint64_t used = std::min(args.experts, args.rows);
  tables.max_tiles = static_cast<uint32_t>((args.rows + used * (TRELLIS_PRODUCT_ROWS - 1)) / TRELLIS_PRODUCT_ROWS);
  tables.offsets = stream.scratch((size_t(args.experts) + 1) * sizeof(uint32_t));
  tables.sorted_rows = stream.scratch(size_t(args.rows) * sizeof(uint32_t));
  tables.inverse = stream.scratch(size_t(args.rows) * sizeof(uint32_t));
  tables.tiles = stream.scratch(size_t(tables.max_tiles) * sizeof(RowTile));
  encode_group(stream, engine, ids, tokens, args.top_k, args.experts, 0, TRELLIS_PRODUCT_ROWS, tables);

  const size_t hidden_bytes = row_bytes(args.hidden, matrices);
  const size_t intermediate_bytes = row_bytes(args.intermediate, matrices);
  const BufferView rotated_x = stream.scratch(hidden_bytes), h = stream.scratch(intermediate_bytes);
  stream.use(engine.pipeline(ROTATE_INPUTS_KERNEL));
  stream.bind(0, x.view());
  stream.bind(1, ids.view);
  stream.bind(2, layer.gate.scales.view());
  stream.bind(3, layer.gate.table.view());
  stream.bind(4, up_or_gate().scales.view());
  stream.bind(5, up_or_gate().table.view());
  stream.bind(6, rotated_x);
  stream.bind_value(7, args);
  rotate(ROTATE_INPUTS_KERNEL, args.hidden, args.rows, matrices, 2 * hidden_bytes);
  product(tables, layer.gate, up_or_gate(), matrices, args.hidden, args.intermediate, rotated_x, h);

  const BufferView rotated_h = stream.scratch(row_bytes(args.intermediate, 1));
  stream.use(engine.pipeline(ROTATE_ACTIVATIONS_KERNEL));
  stream.bind(0, h);
  stream.bind(1, ids.view);
  stream.bind(2, or_any(layer.bias1));
  stream.bind(3, layer.gate.biases.view());
  stream.bind(4, layer.gate.table.view());
  stream.bind(5, up_or_gate().biases.view());
  stream.bind(6, up_or_gate().table.view());
  stream.bind(7, layer.down.scales.view());
  stream.bind(8, layer.down.table.view());
  stream.bind(9, rotated_h);
  stream.bind_value(10, args);
  rotate(ROTATE_ACTIVATIONS_KERNEL, args.intermediate, args.rows, 1, 2 * intermediate_bytes);

  const BufferView y = stream.scratch(row_bytes(args.hidden, 1));
  product(tables, layer.down, layer.down, 1, args.intermediate, args.hidden, rotated_h, y);
  rotate_outputs(y, 1);
}

} // namespace

void encode_trellis_experts(CommandStream& stream, MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                            const SlotsView& ids, const SlotsView& weights, uint32_t top_k, const TensorView& out) {
  const uint32_t tokens = size_argument("tokens of hidden_states", x.shape[0]);
  if (tokens == 0)
    return;
  check_alignment("w1", layer.gate);
  check_alignment("w1", layer.up);
  check_alignment("w2", layer.down);
  RotateArgs args{};
  args.hidden = size_argument("hidden size of hidden_states", x.shape[1]);
  args.intermediate = layer.intermediate;
  args.experts = size_argument("experts of w2", layer.down.table.shape[0]);
  args.rows = tokens * top_k;
  args.slices = 1;
  args.top_k = top_k;
  args.type = static_cast<uint32_t>(x.dtype);
  args.x_row_stride = stride_argument("row stride of hidden_states", x, 0);
  args.ids_token_stride = ids.token_stride;
  args.ids_slot_stride = ids.slot_stride;
  args.id_words = ids.type;
  args.weights_token_stride = weights.token_stride;
  args.weights_slot_stride = weights.slot_stride;
  args.weights_type = weights.type;
  args.gated = layer.activation != ACTIVATION_RELU2;
  args.has_bias1 = bool(layer.bias1);
  args.has_bias2 = bool(layer.bias2);
  args.activation = layer.activation;
  args.alpha = layer.alpha;
  args.limit = layer.limit;

  const bool decode = tokens == 1;
  DispatchTrace& trace = last_dispatch();
  trace.family = family_name(decode ? Family::Decode : Family::Prefill4, true);
  trace.row_tile = decode ? 1 : TRELLIS_PRODUCT_ROWS;
  trace.tile_n = TRELLIS_TILE;
  trace.activation = layer.activation;
  if (!layer.fp32_accumulation)
    count(Fallback::NoFp16Sums);

  Encoding encoding{stream, engine, x, layer, ids, weights, out, tokens, args.gated ? 2u : 1u, args};
  if (decode)
    encoding.decode();
  else
    encoding.grouped();
}

} // namespace metal_moe
