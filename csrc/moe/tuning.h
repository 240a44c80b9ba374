// Where one family takes over from another, per device.
#pragma once

#include "moe/experts.h"
#include "tiles/staged_rows.h"

#include <cstdint>
#include <string>

namespace metal_moe {

struct Tuning {
  // Largest number of tokens of each family; beyond the last it is large_batch. The defaults are the published table of
  // select_moe_kernel.
  uint32_t decode_tokens = 1;
  uint32_t prefill4_tokens = 16;
  uint32_t base_tokens = 32;
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
  /// Threadgroup memory that a matrix family's kernels were compiled for: what the device has.
  uint32_t threadgroup_bytes = 32 << 10;
  /// Between staged rows of 16-bit elements there.
  uint32_t threadgroup_pad_bytes = ROW_PAD_BYTES;
};

/// What holds on the device whose engine is `engine` (Context::engine).
const Tuning& tuning_for(const std::string& engine);

} // namespace metal_moe
