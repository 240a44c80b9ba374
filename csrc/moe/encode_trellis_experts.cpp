#include "encode_trellis_experts.h"

#include "encode_group.h"

#include "../core/trace.h"
#include "moe/group.h"
#include "moe/rotate.h"
#include "moe/trellis_product.h"

#include <algorithm>

namespace metal_moe {

namespace {

/// What the dispatches have in common.
struct Encoding {
  CommandStream& stream;
  MoeEngine& engine;
  const ExpertsLayer& layer;
  const SlotsView& ids;
  uint32_t matrices; // of the first product: gate and up, or one
  RotateArgs args;
  GroupTables tables; // of row tiles; none for one token
  uint32_t tokens;

  /// Rows fp32 [matrices, S, outputs] = rows of `from` fp32 [matrices, S, inputs] times the experts' tiles.
  void product(const QuantizedPart& first, const QuantizedPart& second, uint32_t count, uint32_t inputs,
               uint32_t outputs, const BufferView& from, const BufferView& to);
  void rotate(KernelIndex kernel, uint32_t columns, uint32_t rows, uint32_t count, size_t bytes);
  const QuantizedPart& up_or_gate() const { return layer.up ? layer.up : layer.gate; }
  BufferView or_any(const TensorView& view) const { return view ? view.view() : layer.gate.table.view(); }
  size_t row_bytes(uint32_t columns, uint32_t count) const {
    return size_t(count) * args.rows * rotate_padded(columns) * sizeof(float);
  }
};

/// The dispatch of a kernel whose arguments are bound.
void Encoding::rotate(KernelIndex kernel, uint32_t columns, uint32_t rows, uint32_t count, size_t bytes) {
  const Pipeline& pipeline = engine.pipeline(kernel);
  const uint32_t per_threadgroup = simdgroups(ROTATE_SIMDGROUPS, pipeline.simd_width);
  stream.dispatch(MTL::Size(ceil_div(rotate_blocks(columns), per_threadgroup), rows, count),
                  per_threadgroup * pipeline.simd_width, bytes);
}

void Encoding::product(const QuantizedPart& first, const QuantizedPart& second, uint32_t count, uint32_t inputs,
                       uint32_t outputs, const BufferView& from, const BufferView& to) {
  const bool grouped = tokens > 1;
  const Pipeline& pipeline =
      engine.pipeline(grouped ? TRELLIS_PRODUCT_M4_KERNEL : TRELLIS_PRODUCT_M1_KERNEL, {{first.code, second.code}});
  std::array<uint32_t, 3>& compiled_for = last_dispatch().codes;
  if (&first == &layer.down)
    compiled_for[2] = pipeline.constants.values[0];
  else
    std::copy_n(pipeline.constants.values.begin(), count, compiled_for.begin());
  TrellisProductArgs product{};
  product.rows = args.rows;
  product.inputs = rotate_padded(inputs);
  product.outputs = rotate_padded(outputs);
  product.experts = args.experts;
  product.top_k = args.top_k;
  product.ids_token_stride = args.ids_token_stride;
  product.ids_slot_stride = args.ids_slot_stride;
  product.id_words = args.id_words;
  stream.use(pipeline);
  stream.bind(0, from);
  stream.bind(1, first.codes.view());
  stream.bind(2, first.table.view());
  stream.bind(3, second.codes.view());
  stream.bind(4, second.table.view());
  stream.bind(5, grouped ? tables.sorted_rows : ids.view);
  if (grouped)
    stream.bind(6, tables.tiles);
  stream.bind(7, to);
  stream.bind_value(8, product);
  stream.threadgroup_memory(0, trellis_product_memory(grouped ? TRELLIS_PRODUCT_ROWS : 1));
  const uint32_t columns = TRELLIS_TILE * trellis_product_tiles(pipeline.simd_width);
  // Records are not read here: bytes of codes as if all experts in use were as large as the average one.
  const size_t experts = std::min(args.rows, args.experts);
  const size_t codes = size_t(first.codes.shape[0]) / args.experts * experts * count;
  stream.dispatch(MTL::Size(product.outputs / columns, grouped ? tables.max_tiles : args.rows, count),
                  simdgroups(TRELLIS_PRODUCT_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width,
                  codes + row_bytes(inputs, count) + row_bytes(outputs, count));
}

} // namespace

void encode_trellis_experts(CommandStream& stream, MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                            const SlotsView& ids, const SlotsView& weights, uint32_t top_k, const TensorView& out) {
  const uint32_t tokens = size_argument("tokens of hidden_states", x.shape[0]);
  if (tokens == 0)
    return;
  RotateArgs args{};
  args.hidden = size_argument("hidden size of hidden_states", x.shape[1]);
  args.intermediate = layer.intermediate;
  args.experts = size_argument("experts of w2", layer.down.table.shape[0]);
  args.rows = tokens * top_k;
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

  DispatchTrace& trace = last_dispatch();
  trace.family = family_name(tokens > 1 ? Family::Prefill4 : Family::Decode, true);
  trace.choice = FamilyChoice::Format;
  trace.row_tile = tokens > 1 ? TRELLIS_PRODUCT_ROWS : 1;
  trace.tile_n = TRELLIS_TILE;
  trace.activation = layer.activation;
  if (!layer.fp32_accumulation)
    count(Fallback::NoFp16Sums);

  Encoding encoding{stream, engine, layer, ids, args.gated ? 2u : 1u, args, {}, tokens};
  const uint32_t matrices = encoding.matrices;
  if (tokens > 1) {
    GroupTables& tables = encoding.tables;
    const uint64_t used = std::min(args.experts, args.rows);
    tables.max_tiles = static_cast<uint32_t>((args.rows + used * (TRELLIS_PRODUCT_ROWS - 1)) / TRELLIS_PRODUCT_ROWS);
    tables.offsets = stream.scratch((size_t(args.experts) + 1) * sizeof(uint32_t));
    tables.sorted_rows = stream.scratch(size_t(args.rows) * sizeof(uint32_t));
    tables.inverse = stream.scratch(size_t(args.rows) * sizeof(uint32_t));
    tables.tiles = stream.scratch(size_t(tables.max_tiles) * sizeof(RowTile));
    encode_group(stream, engine, ids, tokens, top_k, args.experts, 0, TRELLIS_PRODUCT_ROWS, tables);
  }
  const size_t hidden_bytes = encoding.row_bytes(args.hidden, matrices);
  const size_t intermediate_bytes = encoding.row_bytes(args.intermediate, matrices);
  const BufferView rotated_x = stream.scratch(hidden_bytes), h = stream.scratch(intermediate_bytes);
  stream.use(engine.pipeline(ROTATE_INPUTS_KERNEL));
  stream.bind(0, x.view());
  stream.bind(1, ids.view);
  stream.bind(2, layer.gate.scales.view());
  stream.bind(3, layer.gate.table.view());
  stream.bind(4, encoding.up_or_gate().scales.view());
  stream.bind(5, encoding.up_or_gate().table.view());
  stream.bind(6, rotated_x);
  stream.bind_value(7, args);
  encoding.rotate(ROTATE_INPUTS_KERNEL, args.hidden, args.rows, matrices, 2 * hidden_bytes);
  encoding.product(layer.gate, encoding.up_or_gate(), matrices, args.hidden, args.intermediate, rotated_x, h);

  const BufferView rotated_h = stream.scratch(encoding.row_bytes(args.intermediate, 1));
  stream.use(engine.pipeline(ROTATE_ACTIVATIONS_KERNEL));
  stream.bind(0, h);
  stream.bind(1, ids.view);
  stream.bind(2, encoding.or_any(layer.bias1));
  stream.bind(3, layer.gate.biases.view());
  stream.bind(4, layer.gate.table.view());
  stream.bind(5, encoding.up_or_gate().biases.view());
  stream.bind(6, encoding.up_or_gate().table.view());
  stream.bind(7, layer.down.scales.view());
  stream.bind(8, layer.down.table.view());
  stream.bind(9, rotated_h);
  stream.bind_value(10, args);
  encoding.rotate(ROTATE_ACTIVATIONS_KERNEL, args.intermediate, args.rows, 1, 2 * intermediate_bytes);

  const BufferView y = stream.scratch(encoding.row_bytes(args.hidden, 1));
  encoding.product(layer.down, layer.down, 1, args.intermediate, args.hidden, rotated_h, y);
  stream.use(engine.pipeline(ROTATE_OUTPUTS_KERNEL));
  stream.bind(0, y);
  stream.bind(1, ids.view);
  stream.bind(2, weights.view);
  stream.bind(3, encoding.or_any(layer.bias2));
  stream.bind(4, layer.down.biases.view());
  stream.bind(5, layer.down.table.view());
  stream.bind(6, out.view());
  stream.bind_value(7, args);
  encoding.rotate(ROTATE_OUTPUTS_KERNEL, args.hidden, tokens, 1, 2 * encoding.row_bytes(args.hidden, 1));
}

} // namespace metal_moe
