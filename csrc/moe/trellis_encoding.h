// The dispatches of a layer's products with trellis weights, one by one, and the rotations of activations around them.
#pragma once

#include "encode_experts.h"
#include "encode_group.h"

#include "moe/rotate.h"
#include "moe/rotated_row.h"

namespace metal_moe {

/// What the dispatches have in common. A product's sums are fp32 [slices, gate and up or one, S, outputs], in order of
/// assignments, outputs rounded up to multiples of 128; rotated rows are [gate and up or one, S, rotated_stride].
class TrellisEncoding {
public:
  struct Sums {
    BufferView view;
    uint32_t slices; // of the inputs: sums are the sum of them
  };

  TrellisEncoding(CommandStream& stream, MoeEngine& engine, const ExpertsPlan& plan, const TensorView& x,
                  const ExpertsLayer& layer, const SlotsView& ids, const SlotsView& weights, const TensorView& out);

  /// Products of a few assignments, which rotate their inputs themselves.
  Sums gate_up_decode();
  Sums down_decode(const Sums& h);
  /// Products of row tiles of TRELLIS_PRODUCT_ROWS, 8 or 16 rows; `row_tile`: that of `tables`.
  Sums gate_up_grouped(const GroupTables& tables, uint32_t row_tile);
  Sums down_grouped(const GroupTables& tables, uint32_t row_tile, const BufferView& rotated);
  /// From the sums of gate and up to the rotated inputs of down.
  BufferView rotate_activations(const Sums& h);
  /// From the sums of down to `out`.
  void rotate_outputs(const Sums& y);

  // Where the other product has other weights. The intermediate is ExpertsEncoding's; `inverse`: of rows that are
  // sorted, or empty.
  /// From the sums of gate and up to the intermediate.
  void unrotate_activations(const Sums& sums, const BufferView& inverse, const BufferView& h);
  /// From the intermediate to the rotated inputs of down.
  BufferView rotate_intermediate(const BufferView& h, const BufferView& inverse);

private:
  /// How a decode product divides its inputs.
  struct Slices {
    uint32_t count;
    uint32_t blocks; // of 128 inputs, of the largest
  };
  Slices slices(const Pipeline& pipeline, uint32_t inputs, uint32_t outputs, uint32_t count) const;
  void dispatch_decode(const Pipeline& pipeline, uint32_t outputs, uint32_t count, Slices slices, size_t bytes);
  /// Sums of `count` matrices: rotated rows of `from` [count, S, rotated_stride] times the experts' tiles.
  Sums product(const GroupTables& tables, uint32_t row_tile, const QuantizedPart& first, const QuantizedPart& second,
               uint32_t count, uint32_t inputs, uint32_t outputs, const BufferView& from);
  /// Buffers 0 to 6 of the kernels that take activations from sums of gate and up.
  void bind_gate_up_sums(const Sums& sums);
  /// The dispatch of a kernel whose arguments are bound.
  void rotate(const Pipeline& pipeline, uint32_t columns, uint32_t count, size_t bytes);
  /// What the pipeline of a product was compiled for.
  void record_codes(const Pipeline& pipeline, bool down) const;

  const QuantizedPart& up_or_gate() const { return layer_.up ? layer_.up : layer_.gate; }
  BufferView or_any(const TensorView& view) const { return view ? view.view() : x_.view(); }
  /// Arguments for sums in as many slices.
  RotateArgs sliced(uint32_t slices) const {
    RotateArgs sliced = args_;
    sliced.slices = slices;
    return sliced;
  }
  size_t row_bytes(uint32_t columns, uint32_t count) const {
    return size_t(count) * args_.rows * rotate_padded(columns) * sizeof(float);
  }
  /// Of rotated rows, as products of row tiles take them.
  size_t rotated_bytes(uint32_t columns, uint32_t count) const {
    return size_t(count) * args_.rows * rotated_stride(rotate_blocks(columns)) * sizeof(float);
  }
  /// Records are not read here: codes as if all experts in use were as large as the average one.
  size_t code_bytes(const QuantizedPart& part) const;

  CommandStream& stream_;
  MoeEngine& engine_;
  const TensorView& x_;
  const ExpertsLayer& layer_;
  const SlotsView& ids_;
  const SlotsView& weights_;
  const TensorView& out_;
  uint32_t tokens_;
  uint32_t matrices_; // of the first product: gate and up, or one
  uint32_t h_row_stride_;
  RotateArgs args_; // for sums in one slice
};

} // namespace metal_moe
