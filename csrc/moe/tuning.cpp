#include "tuning.h"

namespace metal_moe {

const Tuning& tuning_for(const std::string& engine) {
  static const Tuning published;
  // A processor with one-thread simdgroups multiplies fastest in dot products along K, without the exchange of elements
  // that 8x8 matrices need, whatever the number of rows: bench/moe_layer.py, where base and large_batch take 1.5 to 4
  // times as long from 4 to 512 tokens. 65 or more rows of an expert read its weights again from the cache.
  static const Tuning native{
      .prefill4_tokens = UINT32_MAX, .base_tokens = UINT32_MAX, .prefill4_row_tile = PREFILL4_ROW_TILE_ONE_LANE};
  return engine == "native" ? native : published;
}

} // namespace metal_moe
