// The dispatches of a layer's products with dense and quantised weights, one by one.
#pragma once

#include "encode_experts.h"
#include "encode_group.h"

#include <algorithm>

namespace metal_moe {

/// Both matrix products of a layer: whether kernels may read whole vectors without edge handling.
struct Vectorized {
  bool gate_up;
  bool down;
};

/// Tables for the rows of `plan` in tiles of `row_tile` rows, in scratch.
GroupTables encode_plan_group(CommandStream& stream, MoeEngine& engine, const ExpertsPlan& plan, const SlotsView& ids,
                              uint32_t row_tile);

/// What the dispatches have in common. Each product goes with a layer whose other product it knows nothing of. The
/// intermediate h is [rows, h_row_stride] of the activations' type: in order of assignments (decode, and tiles that
/// come from the ids), otherwise sorted.
struct ExpertsEncoding {
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

  void gate_up_decode(const BufferView& h);
  void down_decode(const BufferView& h);
  /// `tables`: empty where tiles come from the ids.
  void gate_up_grouped(const GroupTables& tables, const BufferView& h);
  /// down and combine.
  void down_grouped(const GroupTables& tables, const BufferView& h);

private:
  /// Bind from index 1 on; the first index that is free.
  uint32_t gate_up_weights();
  uint32_t down_weights();
  uint32_t bind_part(uint32_t index, const QuantizedPart& part);
  FunctionConstants gate_up_codes() const;
  MTL::Size grouped_grid(uint32_t blocks, uint32_t code_flags) const;
  void combine(const GroupTables& tables, const BufferView& y);
  /// `view`, or where it is absent any buffer: every argument of a kernel must be bound.
  BufferView or_any(const TensorView& view) const { return view ? view.view() : x.view(); }
  BufferView or_ids(const BufferView& view) const { return view ? view : ids.view; }
  /// Columns of a simdgroup in the GEMV families; down: in prefill4.
  uint32_t gate_up_columns() const { return layer.gate ? QUANTIZED_COLUMNS : GATE_UP_COLUMNS; }
  uint32_t down_columns() const { return layer.down ? QUANTIZED_COLUMNS : DOWN_PREFILL4_COLUMNS; }
  uint32_t widest_intermediate() const { return std::max(plan.shape.intermediate, plan.shape.shared_intermediate); }
  size_t activation_bytes() const { return size_t(plan.rows) * plan.shape.hidden * x.item_size + plan.h_bytes; }
};

} // namespace metal_moe
