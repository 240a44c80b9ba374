#include "trellis_encoding.h"

#include "../core/trace.h"
#include "moe/group.h"
#include "moe/rotate_between.h"
#include "moe/trellis_decode.h"
#include "moe/trellis_product.h"

#include <algorithm>
#include <array>

namespace metal_moe {

namespace {

KernelIndex product_kernel(uint32_t row_tile) {
  return row_tile <= TRELLIS_PRODUCT_ROWS ? TRELLIS_PRODUCT_M4_KERNEL
         : row_tile <= 8                  ? TRELLIS_PRODUCT_M8_KERNEL
         : row_tile <= 16                 ? TRELLIS_PRODUCT_M16_KERNEL
                                          : TRELLIS_PRODUCT_M64_KERNEL;
}

} // namespace

TrellisEncoding::TrellisEncoding(CommandStream& stream, MoeEngine& engine, const ExpertsPlan& plan, const TensorView& x,
                                 const ExpertsLayer& layer, const SlotsView& ids, const SlotsView& weights,
                                 const TensorView& out)
    : stream_(stream), engine_(engine), x_(x), layer_(layer), ids_(ids), weights_(weights), out_(out),
      tokens_(plan.shape.tokens), matrices_(plan.shape.gated ? 2 : 1), h_row_stride_(plan.h_row_stride), args_{} {
  const LayerShape& shape = plan.shape;
  args_.hidden = shape.hidden;
  args_.intermediate = shape.intermediate;
  args_.experts = shape.experts;
  args_.rows = plan.rows;
  args_.slices = 1;
  args_.top_k = shape.top_k;
  args_.type = static_cast<uint32_t>(x.dtype);
  args_.x_row_stride = stride_argument("row stride of hidden_states", x, 0);
  args_.ids_token_stride = ids.token_stride;
  args_.ids_slot_stride = ids.slot_stride;
  args_.id_words = ids.type;
  args_.weights_token_stride = weights.token_stride;
  args_.weights_slot_stride = weights.slot_stride;
  args_.weights_type = weights.type;
  args_.gated = shape.gated;
  args_.has_bias1 = bool(layer.bias1);
  args_.has_bias2 = bool(layer.bias2);
  args_.activation = layer.activation;
  args_.alpha = layer.alpha;
  args_.limit = layer.limit;
}

size_t TrellisEncoding::code_bytes(const QuantizedPart& part) const {
  return size_t(part.codes.shape[0]) / args_.experts * std::min(args_.rows, args_.experts);
}

void TrellisEncoding::record_codes(const Pipeline& pipeline, bool down) const {
  std::array<uint32_t, 3>& compiled_for = last_dispatch().codes;
  if (down)
    compiled_for[2] = pipeline.constants.values[0];
  else
    std::copy_n(pipeline.constants.values.begin(), matrices_, compiled_for.begin());
}

/// One slice after the other sums are formed from. One-thread simdgroups need no more than one.
TrellisEncoding::Slices TrellisEncoding::slices(const Pipeline& pipeline, uint32_t inputs, uint32_t outputs,
                                                uint32_t count) const {
  const uint32_t width = pipeline.simd_width;
  const uint32_t threadgroups = ceil_div(rotate_padded(outputs), trellis_decode_columns(width)) * args_.rows * count;
  const uint32_t blocks = rotate_blocks(inputs);
  const uint32_t slices = width == 1 ? ceil_div(blocks, TRELLIS_DECODE_MAX_BLOCKS)
                                     : trellis_slices(blocks, threadgroups, TRELLIS_DECODE_MAX_BLOCKS);
  return {slices, ceil_div(blocks, slices)};
}

/// The dispatch of a decode kernel whose buffers are bound.
void TrellisEncoding::dispatch_decode(const Pipeline& pipeline, uint32_t outputs, uint32_t count, Slices slices,
                                      size_t bytes) {
  const uint32_t width = pipeline.simd_width;
  stream_.threadgroup_memory(0, rotated_row_bytes(slices.blocks));
  stream_.dispatch(
      MTL::Size(ceil_div(rotate_padded(outputs), trellis_decode_columns(width)), args_.rows, count * slices.count),
      simdgroups(TRELLIS_DECODE_SIMDGROUPS, width) * width, bytes);
}

TrellisEncoding::Sums TrellisEncoding::gate_up_decode() {
  const Pipeline& pipeline = engine_.pipeline(TRELLIS_GATE_UP_DECODE_KERNEL, {{layer_.gate.code, up_or_gate().code}});
  const Slices cut = slices(pipeline, args_.hidden, args_.intermediate, matrices_);
  const Sums h{stream_.scratch(cut.count * row_bytes(args_.intermediate, matrices_)), cut.count};
  record_codes(pipeline, false);
  stream_.use(pipeline);
  stream_.bind(0, x_.view());
  stream_.bind(1, ids_.view);
  stream_.bind(2, layer_.gate.codes.view());
  stream_.bind(3, layer_.gate.scales.view());
  stream_.bind(4, layer_.gate.table.view());
  stream_.bind(5, up_or_gate().codes.view());
  stream_.bind(6, up_or_gate().scales.view());
  stream_.bind(7, up_or_gate().table.view());
  stream_.bind(8, h.view);
  stream_.bind_value(9, TrellisDecodeArgs{args_, cut.count});
  const size_t codes = code_bytes(layer_.gate) + (layer_.up ? code_bytes(layer_.up) : 0);
  dispatch_decode(pipeline, args_.intermediate, matrices_, cut,
                  codes + cut.count * row_bytes(args_.intermediate, matrices_));
  return h;
}

void TrellisEncoding::bind_gate_up_sums(const Sums& sums) {
  stream_.bind(0, sums.view);
  stream_.bind(1, ids_.view);
  stream_.bind(2, or_any(layer_.bias1));
  stream_.bind(3, layer_.gate.biases.view());
  stream_.bind(4, layer_.gate.table.view());
  stream_.bind(5, up_or_gate().biases.view());
  stream_.bind(6, up_or_gate().table.view());
}

TrellisEncoding::Sums TrellisEncoding::down_decode(const Sums& h) {
  const Pipeline& pipeline = engine_.pipeline(TRELLIS_DOWN_DECODE_KERNEL, {{layer_.down.code}});
  const Slices cut = slices(pipeline, args_.intermediate, args_.hidden, 1);
  const Sums y{stream_.scratch(cut.count * row_bytes(args_.hidden, 1)), cut.count};
  record_codes(pipeline, true);
  stream_.use(pipeline);
  bind_gate_up_sums(h);
  stream_.bind(7, layer_.down.codes.view());
  stream_.bind(8, layer_.down.scales.view());
  stream_.bind(9, layer_.down.table.view());
  stream_.bind(10, y.view);
  stream_.bind_value(11, TrellisDecodeArgs{sliced(h.slices), cut.count});
  dispatch_decode(pipeline, args_.hidden, 1, cut,
                  code_bytes(layer_.down) + h.slices * row_bytes(args_.intermediate, matrices_) +
                      cut.count * row_bytes(args_.hidden, 1));
  return y;
}

void TrellisEncoding::rotate(const Pipeline& pipeline, uint32_t columns, uint32_t count, size_t bytes) {
  const uint32_t per_threadgroup = simdgroups(ROTATE_SIMDGROUPS, pipeline.simd_width);
  stream_.dispatch(MTL::Size(ceil_div(rotate_blocks(columns), per_threadgroup), args_.rows, count),
                   per_threadgroup * pipeline.simd_width, bytes);
}

TrellisEncoding::Sums TrellisEncoding::product(const GroupTables& tables, uint32_t row_tile, const QuantizedPart& first,
                                               const QuantizedPart& second, uint32_t count, uint32_t inputs,
                                               uint32_t outputs, const BufferView& from) {
  const Pipeline& pipeline = engine_.pipeline(product_kernel(row_tile), {{first.code, second.code}});
  record_codes(pipeline, &first == &layer_.down);
  const bool matrix = engine_.tuning().packed_products;
  const uint32_t columns = rotate_padded(outputs) / (TRELLIS_TILE * trellis_product_tiles(pipeline.simd_width, matrix));
  const uint32_t blocks = rotate_blocks(inputs);
  const auto threadgroups =
      static_cast<uint32_t>(std::min<uint64_t>(uint64_t(columns) * tables.max_tiles * count, UINT32_MAX));
  const uint32_t slices = pipeline.simd_width == 1 ? 1 : trellis_slices(blocks, threadgroups, blocks);
  const TrellisProductArgs product{args_.rows, rotate_padded(inputs), rotate_padded(outputs), slices, count};
  const Sums to{stream_.scratch(slices * row_bytes(outputs, count)), slices};
  stream_.use(pipeline);
  stream_.bind(0, from);
  stream_.bind(1, first.codes.view());
  stream_.bind(2, first.table.view());
  stream_.bind(3, second.codes.view());
  stream_.bind(4, second.table.view());
  stream_.bind(5, tables.sorted_rows);
  stream_.bind(6, tables.tiles);
  stream_.bind(7, to.view);
  stream_.bind_value(8, product);
  stream_.threadgroup_memory(0, trellis_product_memory(row_tile, matrix));
  stream_.dispatch(MTL::Size(columns, tables.max_tiles, slices * count),
                   simdgroups(TRELLIS_PRODUCT_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width,
                   count * code_bytes(first) + rotated_bytes(inputs, count) + slices * row_bytes(outputs, count));
  return to;
}

TrellisEncoding::Sums TrellisEncoding::gate_up_grouped(const GroupTables& tables, uint32_t row_tile) {
  const size_t bytes = rotated_bytes(args_.hidden, matrices_);
  const BufferView rotated = stream_.scratch(bytes);
  const Pipeline& pipeline = engine_.pipeline(ROTATE_INPUTS_KERNEL);
  stream_.use(pipeline);
  stream_.bind(0, x_.view());
  stream_.bind(1, ids_.view);
  stream_.bind(2, layer_.gate.scales.view());
  stream_.bind(3, layer_.gate.table.view());
  stream_.bind(4, up_or_gate().scales.view());
  stream_.bind(5, up_or_gate().table.view());
  stream_.bind(6, rotated);
  stream_.bind_value(7, args_);
  rotate(pipeline, args_.hidden, matrices_, 2 * bytes);
  return product(tables, row_tile, layer_.gate, up_or_gate(), matrices_, args_.hidden, args_.intermediate, rotated);
}

TrellisEncoding::Sums TrellisEncoding::down_grouped(const GroupTables& tables, uint32_t row_tile,
                                                    const BufferView& rotated) {
  return product(tables, row_tile, layer_.down, layer_.down, 1, args_.intermediate, args_.hidden, rotated);
}

BufferView TrellisEncoding::rotate_activations(const Sums& h) {
  const BufferView rotated = stream_.scratch(rotated_bytes(args_.intermediate, 1));
  const Pipeline& pipeline = engine_.pipeline(ROTATE_ACTIVATIONS_KERNEL);
  stream_.use(pipeline);
  bind_gate_up_sums(h);
  stream_.bind(7, layer_.down.scales.view());
  stream_.bind(8, layer_.down.table.view());
  stream_.bind(9, rotated);
  stream_.bind_value(10, sliced(h.slices));
  rotate(pipeline, args_.intermediate, 1, 2 * h.slices * row_bytes(args_.intermediate, matrices_));
  return rotated;
}

void TrellisEncoding::rotate_outputs(const Sums& y) {
  const Pipeline& pipeline = engine_.pipeline(ROTATE_OUTPUTS_KERNEL);
  stream_.use(pipeline);
  stream_.bind(0, y.view);
  stream_.bind(1, ids_.view);
  stream_.bind(2, weights_.view);
  stream_.bind(3, or_any(layer_.bias2));
  stream_.bind(4, layer_.down.biases.view());
  stream_.bind(5, layer_.down.table.view());
  stream_.bind(6, out_.view());
  stream_.bind_value(7, sliced(y.slices));
  stream_.threadgroup_memory(0, ROTATE_OUTPUT_BYTES);
  stream_.dispatch(MTL::Size(rotate_blocks(args_.hidden), tokens_, 1),
                   simdgroups(ROTATE_OUTPUT_SIMDGROUPS, pipeline.simd_width) * pipeline.simd_width,
                   y.slices * row_bytes(args_.hidden, 1));
}

void TrellisEncoding::unrotate_activations(const Sums& sums, const BufferView& inverse, const BufferView& h) {
  const Pipeline& pipeline = engine_.pipeline(UNROTATE_ACTIVATIONS_KERNEL);
  stream_.use(pipeline);
  bind_gate_up_sums(sums);
  stream_.bind(7, inverse ? inverse : ids_.view);
  stream_.bind(8, h);
  stream_.bind_value(9, RotateBetweenArgs{sliced(sums.slices), h_row_stride_, bool(inverse)});
  rotate(pipeline, args_.intermediate, 1, 2 * sums.slices * row_bytes(args_.intermediate, matrices_));
}

BufferView TrellisEncoding::rotate_intermediate(const BufferView& h, const BufferView& inverse) {
  const BufferView rotated = stream_.scratch(rotated_bytes(args_.intermediate, 1));
  const Pipeline& pipeline = engine_.pipeline(ROTATE_INTERMEDIATE_KERNEL);
  stream_.use(pipeline);
  stream_.bind(0, h);
  stream_.bind(1, ids_.view);
  stream_.bind(2, layer_.down.scales.view());
  stream_.bind(3, layer_.down.table.view());
  stream_.bind(4, inverse ? inverse : ids_.view);
  stream_.bind(5, rotated);
  stream_.bind_value(6, RotateBetweenArgs{args_, h_row_stride_, bool(inverse)});
  rotate(pipeline, args_.intermediate, 1, 2 * row_bytes(args_.intermediate, 1));
  return rotated;
}

} // namespace metal_moe
