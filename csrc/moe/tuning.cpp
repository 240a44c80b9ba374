#include "tuning.h"

namespace metal_moe {

const Tuning& tuning_for(const std::string& engine) {
  static const Tuning published;
  // A processor with one-thread simdgroups multiplies fastest in dot products along K, without the exchange of elements
  // that 8x8 matrices need, whatever the number of rows: bench/moe_layer.py, where base and large_batch take 1.5 to 4
  // times as long from 4 to 512 tokens. 65 or more rows of an expert read its weights again from the cache.
  // One lane holds one assignment: tiles come from `group`, which costs a microsecond there.
  static const Tuning native{.prefill4_tokens = UINT32_MAX,
                             .base_tokens = UINT32_MAX,
                             .prefill4_row_tile = PREFILL4_ROW_TILE_ONE_LANE,
                             .tiles_from_ids_assignments = 0};
  // Tensor cores are idle most of the time whatever the tile, so padding costs little and reading weights again more;
  // copies run ahead of the arithmetic, where dot products wait for their loads.
  static const Tuning cuda{.prefill4_tokens = 1,
                           .base_tokens = 1,
                           .row_tile_per_mean_rows = 1.5f,
                           .largest_row_tile = 128,
                           .threadgroup_pad_bytes = 0};
  // The published table, but every kernel is selected for some shape.
  static const Tuning exact{.largest_row_tile = 128};
  // "null" is the native engine in all but running.
  return engine == "native" || engine == "null" ? native
         : engine == "cuda"                     ? cuda
         : engine == "exact"                    ? exact
                                                : published;
}

} // namespace metal_moe
