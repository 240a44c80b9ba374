#include "encode_experts.h"

#include "encode_trellis_experts.h"
#include "experts_encoding.h"

#include "../core/trace.h"
#include "formats/matrix_code.h"
#include "moe/trellis_product.h"

namespace metal_moe {

namespace {

/// Whether every row of a [rows..., K] tensor starts at a multiple of VECTOR_BYTES.
bool rows_aligned(const TensorView& tensor, uint64_t row_stride) {
  return tensor.address % VECTOR_BYTES == 0 && row_stride * tensor.item_size % VECTOR_BYTES == 0;
}

Vectorized vectorized(const TensorView& x, const ExpertsLayer& layer, const LayerShape& shape, uint32_t x_row_stride) {
  const bool shared = shape.shared > 0;
  return {layer.trellis_gate_up || (shape.hidden % 8 == 0 && rows_aligned(x, x_row_stride) &&
                                    (layer.gate || rows_aligned(layer.w1, shape.hidden)) &&
                                    (!shared || rows_aligned(layer.shared_w1, shape.hidden))),
          layer.trellis_down ||
              (shape.intermediate % 8 == 0 && (layer.down || rows_aligned(layer.w2, shape.intermediate)) &&
               (!shared ||
                (shape.shared_intermediate % 8 == 0 && rows_aligned(layer.shared_w2, shape.shared_intermediate))))};
}

/// Kernels of quantised weights read x, codes, scales and biases in vectors, from addresses that the caller sees to.
void check_quantized(const TensorView& x, const ExpertsLayer& layer, uint32_t x_row_stride) {
  check_alignment("w1", layer.gate);
  check_alignment("w1", layer.up);
  check_alignment("w2", layer.down);
  check_alignment("shared_w1", layer.shared_gate);
  check_alignment("shared_w1", layer.shared_up);
  check_alignment("shared_w2", layer.shared_down);
  if (layer.gate && !layer.trellis_gate_up && !rows_aligned(x, x_row_stride))
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

/// Of one expert.
size_t part_bytes(const QuantizedPart& part) {
  size_t bytes = 0;
  for (const TensorView* buffer : {&part.codes, &part.scales, &part.biases})
    bytes += *buffer ? static_cast<size_t>(buffer->shape[0]) : 0;
  return part ? std::max<size_t>(bytes / static_cast<size_t>(part.table.shape[0]), 1) : 0;
}

Family requested_family(const ExpertsLayer& layer, const LayerShape& shape, bool fp32_accumulation) {
  if (!shape.quantized())
    return parse_family(*layer.family, fp32_accumulation);
  return parse_layer_family(*layer.family, layer.activation, layer.codes(), layer.trellis());
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
  shape.trellis = layer.trellis_gate_up || layer.trellis_down;
  shape.trellis_alone = layer.trellis();
  shape.quantized_gate_up_bytes = part_bytes(layer.gate) + part_bytes(layer.up);
  shape.quantized_down_bytes = part_bytes(layer.down);
  shape.quantized_shared_gate_up_bytes = part_bytes(layer.shared_gate) + part_bytes(layer.shared_up);
  shape.quantized_shared_down_bytes = part_bytes(layer.shared_down);
  return shape;
}

ExpertsPacking pack_experts(const MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                            const SlotsView& ids, const SlotsView& weights, uint32_t top_k) {
  LayerShape shape = layer_shape(x, layer, top_k);
  const bool fp32_accumulation = layer.fp32_accumulation || shape.dtype != Dtype::Fp16 || shape.quantized();
  TunedLayer kind = tuned_layer(shape);
  kind.trellis = layer.trellis();
  const Tuning* const measured = engine.measured(kind);
  const Tuning& tuning = measured ? *measured : engine.tuning();
  const uint64_t assignments = uint64_t(shape.tokens) * shape.top_k;
  const auto group = [&](uint32_t code) { return code_is_packed(code, x.item_size) ? code_group_size(code) : 0; };
  const uint32_t gate_up_group = !shape.gated || layer.gate.code == layer.up.code ? group(layer.gate.code) : 0;
  const uint32_t down_group = group(layer.down.code);
  if (tuning.packed_products) {
    shape.packed_gate_up_group = gate_up_group;
    shape.packed_down_group = down_group;
  }
  ExpertsPacking packing{};
  packing.codes = layer.codes();
  packing.choice = FamilyChoice::Tokens;
  Family family;
  if (layer.family) {
    family = requested_family(layer, shape, fp32_accumulation);
    packing.choice = FamilyChoice::Requested;
  } else if (layer.trellis() && !measured) {
    family = select_trellis_family(tuning, shape.tokens, assignments, shape.experts);
    packing.choice = FamilyChoice::Format;
  } else if (shape.quantized_gate_up_bytes && shape.quantized_down_bytes && !shape.trellis) {
    family = select_quantized_family(tuning, shape.tokens, assignments, shape.experts, gate_up_group && down_group);
  } else {
    family = select_family(tuning, shape.tokens, assignments);
  }
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
  args.x_row_stride = stride_argument("row stride of hidden_states", x, 0); // of one row: 0, any alignment
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
  trace.choice = packing.choice;
  trace.row_tile = plan.row_tile;
  trace.tile_n = layer.trellis() ? TRELLIS_TILE : plan.variant->tile_n;
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
  ExpertsEncoding encoding{stream, engine, plan, x, layer, ids, weights, shared_weights, out, aligned, args};
  if (shape.trellis)
    return encode_trellis_experts(encoding);
  const BufferView h = stream.scratch(plan.h_bytes);
  if (!plan.grouped) {
    encoding.gate_up_decode(h);
    encoding.down_decode(h);
    return;
  }
  const GroupTables tables =
      plan.tiles_from_ids ? GroupTables{} : encode_plan_group(stream, engine, plan, ids, plan.row_tile);
  encoding.gate_up_grouped(tables, h);
  encoding.down_grouped(tables, h);
}

void encode_experts(CommandStream& stream, MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                    const SlotsView& ids, const SlotsView& weights, uint32_t top_k, const TensorView& out) {
  encode_experts(stream, engine, pack_experts(engine, x, layer, ids, weights, top_k), x, layer, ids, weights, out);
}

} // namespace metal_moe
