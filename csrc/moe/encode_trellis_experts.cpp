#include "encode_trellis_experts.h"

#include "trellis_encoding.h"

#include "moe/trellis_product.h"

namespace metal_moe {

namespace {

void encode_both(const ExpertsPlan& plan, TrellisEncoding& trellis, const GroupTables& tables) {
  if (!plan.grouped) {
    trellis.rotate_outputs(trellis.down_decode(trellis.gate_up_decode()));
    return;
  }
  const BufferView rotated = trellis.rotate_activations(trellis.gate_up_grouped(tables, plan.row_tile));
  trellis.rotate_outputs(trellis.down_grouped(tables, plan.row_tile, rotated));
}

void encode_gate_up(const ExpertsPlan& plan, TrellisEncoding& trellis, ExpertsEncoding& others,
                    const GroupTables& tables, const BufferView& h) {
  if (!plan.grouped) {
    trellis.unrotate_activations(trellis.gate_up_decode(), {}, h);
    others.down_decode(h);
    return;
  }
  trellis.unrotate_activations(trellis.gate_up_grouped(tables, plan.row_tile), tables.inverse, h);
  others.down_grouped(tables, h);
}

void encode_down(const ExpertsPlan& plan, TrellisEncoding& trellis, ExpertsEncoding& others, const GroupTables& tables,
                 uint32_t row_tile, const BufferView& h) {
  if (plan.grouped)
    others.gate_up_grouped(tables, h);
  else
    others.gate_up_decode(h);
  const BufferView rotated = trellis.rotate_intermediate(h, plan.grouped ? tables.inverse : BufferView{});
  trellis.rotate_outputs(trellis.down_grouped(tables, row_tile, rotated));
}

} // namespace

void encode_trellis_experts(ExpertsEncoding& others) {
  const ExpertsPlan& plan = others.plan;
  const ExpertsLayer& layer = others.layer;
  CommandStream& stream = others.stream;
  TrellisEncoding trellis(stream, others.engine, plan, others.x, layer, others.ids, others.weights, others.out);
  // The decode kernel of down rotates what its own gate and up made: after other ones the product is of row tiles.
  const bool only_down = !layer.trellis_gate_up;
  const uint32_t row_tile = plan.grouped ? plan.row_tile : TRELLIS_PRODUCT_ROWS;
  GroupTables tables;
  if (plan.grouped || only_down)
    tables = encode_plan_group(stream, others.engine, plan, others.ids, row_tile);
  if (layer.trellis())
    return encode_both(plan, trellis, tables);
  const BufferView h = stream.scratch(plan.h_bytes);
  if (only_down)
    encode_down(plan, trellis, others, tables, row_tile, h);
  else
    encode_gate_up(plan, trellis, others, tables, h);
}

} // namespace metal_moe
