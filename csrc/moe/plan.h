// Which dispatches compute the experts of a layer, and the scratch between them. Pure arithmetic on sizes: everything
// that encoding needs to know is decided here.
#pragma once

#include "kernel_select.h"

namespace metal_moe {

/// The sizes of a layer.
struct LayerShape {
  uint32_t tokens = 0;
  uint32_t hidden = 0;
  uint32_t intermediate = 0;
  uint32_t experts = 0;
  uint32_t top_k = 0;
  uint32_t shared = 0;              // shared experts
  uint32_t shared_intermediate = 0; // 0 where there are none
  Dtype dtype = Dtype::Fp32;
  bool gated = true;
  bool trellis = false;       // one of the products has trellis weights, or both
  bool trellis_alone = false; // both have
  /// Bytes of one expert's quantised weights; 0: dense.
  size_t quantized_gate_up_bytes = 0;
  size_t quantized_down_bytes = 0;
  size_t quantized_shared_gate_up_bytes = 0;
  size_t quantized_shared_down_bytes = 0;

  /// Columns of a scale where the product's kernels are packed ones (Tuning::packed_products); else 0.
  uint32_t packed_gate_up_group = 0;
  uint32_t packed_down_group = 0;

  bool quantized() const { return quantized_gate_up_bytes || quantized_down_bytes; }
};

/// What a measured tuning is looked up by.
TunedLayer tuned_layer(const LayerShape& shape);

struct ExpertsPlan {
  LayerShape shape;
  Family family;
  const Variant* variant;
  uint32_t row_tile;
  bool fp32_accumulation;
  bool grouped;        // rows of an expert together: combine runs too
  bool tiles_from_ids; // grouped: threadgroups find their row tiles in the ids; else group runs first

  KernelIndex gate_up;
  KernelIndex down;
  KernelIndex combine; // grouped

  uint32_t slots;          // of a token: top_k + shared
  uint32_t rows;           // S = tokens * slots
  uint32_t tiles;          // grouped: elements of the tile table
  uint32_t h_row_stride;   // elements
  uint32_t gate_up_blocks; // column blocks of the grid
  uint32_t down_blocks;
  uint32_t gate_up_simdgroups; // of a threadgroup on a GPU, decode as a packed product
  uint32_t down_simdgroups;    // likewise, decode of any kind
  uint32_t gate_up_code_flags; // added to the codes of packed products: CODE_SHORT_ROWS or 0
  uint32_t down_code_flags;
  uint32_t gate_up_bytes; // of threadgroup memory; 0: none
  uint32_t down_bytes;
  size_t h_bytes;
  size_t y_bytes; // grouped
  /// Weights, read once, of as many experts as can be chosen: what the commit policy counts.
  size_t gate_up_weight_bytes;
  size_t down_weight_bytes;
};

/// Row tiles of `rows` rows in groups of at most `row_tile`, with rows of at most `experts` experts: the most there can
/// be, whatever the routing.
constexpr uint32_t max_row_tiles(uint32_t rows, uint32_t row_tile, uint32_t experts) {
  const uint64_t used = experts < rows ? experts : rows;
  return static_cast<uint32_t>((rows + used * (row_tile - 1)) / row_tile);
}

/// Plan for `family`. `fp32_accumulation` is raised where the dtype has no other. std::invalid_argument naming the
/// argument where a size is beyond what the grouping kernel takes.
ExpertsPlan plan_experts(const Tuning& tuning, Family family, const LayerShape& shape, bool fp32_accumulation);

} // namespace metal_moe
