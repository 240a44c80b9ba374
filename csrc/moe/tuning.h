// Where one family takes over from another, per device.
#pragma once

#include "types.h"

#include "linear/matmul.h"
#include "moe/experts.h"
#include "tiles/staged_rows.h"

#include <cstdint>
#include <string>
#include <vector>

namespace metal_moe {

/// decode reads an expert's weights again for each of its rows: up to so many tokens, and rows of an expert in the
/// mean. One token is always within it.
struct DecodeLimit {
  uint32_t tokens = 1;
  float mean_rows = 0.0f;

  bool holds(uint32_t of_tokens, uint64_t assignments, uint32_t experts) const {
    return of_tokens <= 1 ||
           (of_tokens <= tokens && static_cast<double>(assignments) <= static_cast<double>(mean_rows) * experts);
  }
};

struct Tuning {
  // Largest number of tokens of each family; beyond the last it is large_batch. The defaults are the published table of
  // select_moe_kernel.
  uint32_t decode_tokens = 1;
  uint32_t prefill4_tokens = 16;
  uint32_t base_tokens = 32;
  /// From two tokens on, layers of at most as many assignments (tokens * top_k) are base whatever the tokens: so few
  /// tiles that smaller ones, of which there are more, fill the cores evenly.
  uint32_t base_assignments = 0;
  /// Where layers whose weights are all quantised are decode whatever the families' tokens: such layers; those of 4-bit
  /// affine codes (code_is_packed), which have products of their own; those of trellis codes alone.
  DecodeLimit quantized_decode = {};
  DecodeLimit packed_decode = {};
  DecodeLimit trellis_decode = {};
  /// Whether such layers are base instead of large_batch where the rows of experts need no larger tiles than it has.
  bool few_rows_are_base = false;
  /// Rows of a prefill4 tile.
  uint32_t prefill4_row_tile = PREFILL4_ROW_TILE;
  /// Grouped families find their row tiles in the ids, without `group`, up to so many assignments; 0: never. A lane
  /// each is what the kernels can do. Every GPU's simdgroup is wide enough.
  uint32_t tiles_from_ids_assignments = TILES_FROM_IDS_ASSIGNMENTS;
  /// large_batch and simd take the smallest row tile of at least this many times the mean rows per expert: below 1
  /// weights are read more than once, above it rows are multiplied that do not exist.
  float row_tile_per_mean_rows = 1.0f;
  /// Beyond it a simdgroup has more sums than registers.
  uint32_t largest_row_tile = 64;
  /// Layers whose weights are all trellis codes are large_batch where an expert has as many rows in the mean, otherwise
  /// prefill4, where they are not decode.
  uint32_t trellis_large_batch_rows = UINT32_MAX;
  /// Their row tiles have TRELLIS_PRODUCT_MOST_ROWS in large_batch where an expert has as many rows in the mean.
  uint32_t trellis_many_rows = UINT32_MAX;
  /// Rows up to which a small product (csrc/linear) runs in dot products: those that share a weight in registers.
  uint32_t product_gemv_rows = MATMUL_GEMV_ROWS;
  /// Whether kernels decode 4-bit affine codes, and trellis codes for rows, straight into operands of matrix
  /// instructions: moe/packed_product.h, moe/trellis_product.h.
  bool packed_products = false;
  /// Threadgroups that the memory which a device gives one of them is to hold: loads of one are under way while another
  /// multiplies.
  uint32_t threadgroups_of_memory = 1;
  /// Threadgroup memory that a matrix family's kernels were compiled for: that part of what the device has.
  uint32_t threadgroup_bytes = 32 << 10;
  /// Between staged rows of 16-bit elements there.
  uint32_t threadgroup_pad_bytes = ROW_PAD_BYTES;
};

/// What holds on the device whose engine is `engine` (Context::engine).
const Tuning& tuning_for(const std::string& engine);

/// The layer that a tuning is asked for.
struct TunedLayer {
  uint32_t hidden = 0; // 0, in a table: layers of every shape
  uint32_t intermediate = 0;
  uint32_t experts = 0;
  uint32_t top_k = 0;
  Dtype dtype = Dtype::Other; // of hidden states; Other, where one is asked for: any
  bool quantized = false;
  float weight_bits = 0.0f; // with scales, the mean of a layer's weights
  bool trellis = false;     // quantised, and all of them trellis codes: they have kernels of their own
};

/// What `metal-moe tune` measured on a device. The same table and layer always give the same tuning.
class TuningTable {
public:
  struct Entry {
    TunedLayer layer;
    Tuning tuning;
  };

  TuningTable() = default;
  /// std::invalid_argument naming the field, its value and the limit where an entry makes no sense.
  explicit TuningTable(std::vector<Entry> entries);

  /// The tuning of the entry for the layer's dtype and kind of weights that has the layer's shape, or where none has,
  /// of one for every shape; among several the one whose bits are nearest, then the first. Null where there is none.
  const Tuning* find(const TunedLayer& layer) const;

private:
  std::vector<Entry> entries_;
};

} // namespace metal_moe
