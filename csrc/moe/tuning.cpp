#include "tuning.h"

#include <cmath>
#include <stdexcept>
#include <utility>

namespace metal_moe {

namespace {

void check_at_most(const char* name, double value, const char* limit_name, double limit) {
  if (!(value <= limit))
    throw std::invalid_argument(std::string("tuning: ") + name + " is " + std::to_string(value) + ": must be at most " +
                                std::to_string(limit) + ", " + limit_name);
}

void check_at_least(const char* name, double value, double limit) {
  if (!(value >= limit))
    throw std::invalid_argument(std::string("tuning: ") + name + " is " + std::to_string(value) +
                                ": must be at least " + std::to_string(limit));
}

void check(const Tuning& tuning) {
  check_at_least("decode_tokens", tuning.decode_tokens, 1);
  check_at_most("decode_tokens", tuning.decode_tokens, "prefill4_tokens", tuning.prefill4_tokens);
  check_at_most("prefill4_tokens", tuning.prefill4_tokens, "base_tokens", tuning.base_tokens);
  check_at_least("prefill4_row_tile", tuning.prefill4_row_tile, 1);
  check_at_most("prefill4_row_tile", tuning.prefill4_row_tile, "the most that a tile has", PREFILL4_ROW_TILE_ONE_LANE);
  check_at_least("row_tile_per_mean_rows", tuning.row_tile_per_mean_rows, 0);
  check_at_most("row_tile_per_mean_rows", tuning.row_tile_per_mean_rows, "beyond which every tile is the largest",
                1024);
  check_at_least("largest_row_tile", tuning.largest_row_tile, 1);
}

} // namespace

const Tuning& tuning_for(const std::string& engine) {
  static const Tuning published;
  // A processor with one-thread simdgroups multiplies fastest in dot products along K, without the exchange of elements
  // that 8x8 matrices need, whatever the number of rows: bench/moe_layer.py, where base and large_batch take 1.5 to 4
  // times as long from 4 to 512 tokens. 65 or more rows of an expert read its weights again from the cache.
  // One lane holds one assignment: tiles come from `group`, which costs a microsecond there.
  // Decoding trellis weights costs more than multiplying them: 16 rows that share it take 0.6 to 0.9 times as long as
  // four, from four rows of an expert on (4 bits, 8 experts of 1024 x 512, 16 to 256 tokens, AVX2); below, as long.
  // decode multiplies 4-bit codes in integers (AVX2), 1.2 to 2 times as fast as prefill4 up to two rows of an expert.
  static const Tuning native{.prefill4_tokens = UINT32_MAX,
                             .base_tokens = UINT32_MAX,
                             .packed_decode = {UINT32_MAX, 2.0f},
                             .prefill4_row_tile = PREFILL4_ROW_TILE_ONE_LANE,
                             .tiles_from_ids_assignments = 0,
                             .trellis_large_batch_rows = 4,
                             .product_gemv_rows = UINT32_MAX};
  // Tensor cores are idle most of the time whatever the tile, so padding costs little and reading weights again more;
  // copies run ahead of the arithmetic, where dot products wait for their loads. Four tokens of GLM-4.7-Flash: 69.9 us
  // with base, 72.6 with large_batch; of Qwen3-30B-A3B, twice the assignments, 80.2 and 79.8 (H200). 16 rows of trellis
  // weights take at most 1.5 times the instructions of four, by the compiled loops. Few tokens of quantised weights:
  // docs/performance.md.
  static const Tuning cuda{.prefill4_tokens = 1,
                           .base_tokens = 1,
                           .base_assignments = 16,
                           .quantized_decode = {24, 4.0f},
                           .packed_decode = {3, 0.75f},
                           .trellis_decode = {UINT32_MAX, 0.5f},
                           .few_rows_are_base = true,
                           .row_tile_per_mean_rows = 1.5f,
                           .largest_row_tile = 128,
                           .trellis_large_batch_rows = 4,
                           .trellis_many_rows = 20,
                           .packed_products = true,
                           .threadgroups_of_memory = 2,
                           .threadgroup_pad_bytes = 0};
  // The published table, but every kernel is selected for some shape.
  static const Tuning exact{.largest_row_tile = 128, .trellis_many_rows = 24};
  // "null" is the native engine in all but running.
  return engine == "native" || engine == "null" ? native
         : engine == "cuda"                     ? cuda
         : engine == "exact"                    ? exact
                                                : published;
}

TuningTable::TuningTable(std::vector<Entry> entries) : entries_(std::move(entries)) {
  for (const Entry& entry : entries_)
    check(entry.tuning);
}

const Tuning* TuningTable::find(const TunedLayer& layer) const {
  const Entry* best = nullptr;
  const auto same_shape = [&](const TunedLayer& other) {
    return other.hidden == layer.hidden && other.intermediate == layer.intermediate && other.experts == layer.experts &&
           other.top_k == layer.top_k;
  };
  const auto distance = [&](const Entry& entry) { return std::fabs(entry.layer.weight_bits - layer.weight_bits); };
  for (const Entry& entry : entries_) {
    const bool any_shape = entry.layer.hidden == 0;
    if (entry.layer.quantized != layer.quantized || entry.layer.trellis != layer.trellis ||
        (layer.dtype != Dtype::Other && entry.layer.dtype != layer.dtype) || (!any_shape && !same_shape(entry.layer)))
      continue;
    const bool best_is_any_shape = best && best->layer.hidden == 0;
    if (!best || (best_is_any_shape && !any_shape) ||
        (best_is_any_shape == any_shape && distance(entry) < distance(*best)))
      best = &entry;
  }
  return best ? &best->tuning : nullptr;
}

} // namespace metal_moe
