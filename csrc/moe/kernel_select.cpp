#include "kernel_select.h"

#include "specialization.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace metal_moe {

namespace {

constexpr double MAX_QUANTIZED_BITS = 8;

/// "6", "2.5".
std::string text_of(double bits) {
  char text[32];
  std::snprintf(text, sizeof text, "%.15g", bits);
  return text;
}

void check_bits(const char* name, Bits bits) {
  if (!bits || *bits == 16 || *bits == 32)
    return;
  if (!(*bits >= 1 && *bits <= MAX_QUANTIZED_BITS) || std::floor(2 * *bits) != 2 * *bits)
    throw std::invalid_argument(std::string(name) + " is " + text_of(*bits) +
                                ": must be None, 16 or 32 (dense) or 1 to 8 in halves (quantised)");
}

bool is_quantized(Bits bits) { return bits && *bits <= MAX_QUANTIZED_BITS; }

/// Of trellis weights: the published table.
Selection select_quantized(Family family, bool fp32, Bits gate_bits, Bits up_bits, Bits down_bits) {
  const std::string name = "moe_trellis_swiglu", acc = fp32 ? "_fp32acc" : "";
  if (family == Family::Decode) {
    if (!is_quantized(gate_bits) || !is_quantized(up_bits) || !is_quantized(down_bits))
      return {name + "_decode", GEMV_TILE_N};
    return {name + "_decode_" + text_of(*gate_bits) + "_" + text_of(*up_bits) + "_" + text_of(*down_bits), GEMV_TILE_N};
  }
  if (family == Family::Prefill4)
    return {name + "_prefill4" + acc, GEMV_TILE_N};
  if (family == Family::Base || fp32)
    return {name + acc, BASE_TILE_N};
  return {name + "_large_batch", LARGE_BATCH_TILE_N};
}

/// `family` of quantised weights, or base: Tuning::few_rows_are_base.
Family few_rows_family(const Tuning& tuning, Family family, uint64_t assignments, uint32_t experts) {
  const double rows = tuning.row_tile_per_mean_rows * static_cast<double>(assignments);
  return tuning.few_rows_are_base && family == Family::LargeBatch && rows <= double(BASE_ROW_TILE) * experts
             ? Family::Base
             : family;
}

} // namespace

Family select_family(const Tuning& tuning, uint32_t tokens, uint64_t assignments) {
  if (tokens <= tuning.decode_tokens)
    return Family::Decode;
  if (assignments <= tuning.base_assignments)
    return Family::Base;
  if (tokens <= tuning.prefill4_tokens)
    return Family::Prefill4;
  if (tokens <= tuning.base_tokens)
    return Family::Base;
  return Family::LargeBatch;
}

Family select_quantized_family(const Tuning& tuning, uint32_t tokens, uint64_t assignments, uint32_t experts,
                               bool packed) {
  if ((packed ? tuning.packed_decode : tuning.quantized_decode).holds(tokens, assignments, experts))
    return Family::Decode;
  return few_rows_family(tuning, select_family(tuning, tokens, assignments), assignments, experts);
}

Family select_trellis_family(const Tuning& tuning, uint32_t tokens, uint64_t assignments, uint32_t experts) {
  if (tuning.trellis_decode.holds(tokens, assignments, experts))
    return Family::Decode;
  if (assignments < uint64_t(tuning.trellis_large_batch_rows) * experts)
    return Family::Prefill4;
  return few_rows_family(tuning, Family::LargeBatch, assignments, experts);
}

uint32_t select_variant(const Tuning& tuning, Family family, uint64_t routed_rows, uint32_t experts) {
  uint32_t variant = 0;
  while (VARIANTS[variant].family != family)
    ++variant;
  const double wanted = tuning.row_tile_per_mean_rows * static_cast<double>(routed_rows) / std::max(experts, 1u);
  while (VARIANTS[variant].row_tile < wanted && variant + 1 < VARIANTS.size() &&
         VARIANTS[variant + 1].family == family && VARIANTS[variant + 1].row_tile <= tuning.largest_row_tile)
    ++variant;
  return variant;
}

Selection select_moe_kernel(int64_t batch_size, bool use_fp32_acc, Bits gate_bits, Bits up_bits, Bits down_bits,
                            const Tuning& tuning) {
  if (batch_size < 0)
    throw std::invalid_argument("batch_size is " + std::to_string(batch_size) + ": must not be negative");
  check_bits("gate_bits", gate_bits);
  check_bits("up_bits", up_bits);
  check_bits("down_bits", down_bits);
  const auto tokens = static_cast<uint32_t>(std::min<int64_t>(batch_size, UINT32_MAX));
  const Family family = select_family(tuning, tokens, UINT64_MAX);
  if (is_quantized(gate_bits) || is_quantized(up_bits) || is_quantized(down_bits))
    return select_quantized(family, use_fp32_acc, gate_bits, up_bits, down_bits);
  return {family_name(family, use_fp32_acc), VARIANTS[select_variant(tuning, family, 0, 1)].tile_n};
}

TunedLayer layer_of_bits(Bits gate_bits, Bits up_bits, Bits down_bits) {
  TunedLayer layer;
  for (Bits bits : {gate_bits, up_bits, down_bits}) {
    const double own = bits.value_or(16);
    layer.quantized |= is_quantized(bits);
    layer.weight_bits += static_cast<float>(own) / 3.0f;
  }
  return layer;
}

Family parse_layer_family(std::string_view name, uint32_t activation, const std::array<uint32_t, 3>& codes,
                          bool trellis) {
  for (uint32_t i = 0; i < FAMILIES; ++i)
    if (names_layer(name, family_name(static_cast<Family>(i), true), activation, codes, trellis))
      return static_cast<Family>(i);
  try {
    return parse_family(name, true);
  } catch (const std::invalid_argument& error) {
    const std::string own = layer_name(family_name(Family::Decode, true), activation, codes);
    throw std::invalid_argument(own.empty() ? error.what() : error.what() + (", or of this layer, as '" + own + "'"));
  }
}

Family parse_family(std::string_view name, bool fp32_accumulation) {
  constexpr std::string_view prefix = "moe_";
  for (uint32_t i = 0; i < FAMILIES; ++i) {
    const auto family = static_cast<Family>(i);
    for (bool fp32 : {false, true}) {
      const std::string_view full = family_name(family, fp32);
      if (name != full && name != full.substr(prefix.size()))
        continue;
      if (fp32 && !fp32_accumulation)
        throw std::invalid_argument("kernel is '" + std::string(name) +
                                    "', which accumulates in fp32, but use_fp32_acc is False");
      return family;
    }
  }
  std::string names;
  for (uint32_t i = 0; i < FAMILIES; ++i)
    for (bool fp32 : {false, true})
      names.append(names.empty() ? "'" : ", '").append(family_name(static_cast<Family>(i), fp32)).append("'");
  throw std::invalid_argument("kernel is '" + std::string(name) + "': must be one of " + names);
}

} // namespace metal_moe
