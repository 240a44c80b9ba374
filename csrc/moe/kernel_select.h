// Which family computes the experts of a layer.
#pragma once

#include "kernel_table.h"
#include "tuning.h"

#include <array>
#include <optional>
#include <string>
#include <string_view>

namespace metal_moe {

struct Selection {
  std::string name; // "moe_decode_fp32acc"; of quantised weights "moe_trellis_swiglu_decode_6_2_3"
  uint32_t tile_n;
};

/// Of a weight; none: dense.
using Bits = std::optional<double>;

/// Family by number of tokens, name and output columns per threadgroup; by default the published selection. Bits: none,
/// 16 or 32 for dense weights, 1 to 8 in halves for quantised ones, whose names in decode tell the bits of all three.
/// std::invalid_argument for a negative batch size and for other bits.
Selection select_moe_kernel(int64_t batch_size, bool use_fp32_acc, Bits gate_bits, Bits up_bits, Bits down_bits,
                            const Tuning& tuning = {});

/// Layers of any shape with weights of these bits, as a measured tuning is looked up for them.
TunedLayer layer_of_bits(Bits gate_bits, Bits up_bits, Bits down_bits);

/// Family for `tokens` tokens.
Family select_family(const Tuning& tuning, uint32_t tokens, uint64_t assignments);

/// The same of a layer whose weights are all quantised, none of them trellis codes. `packed`: all are code_is_packed.
Family select_quantized_family(const Tuning& tuning, uint32_t tokens, uint64_t assignments, uint32_t experts,
                               bool packed);

/// The same of a layer whose weights are all trellis codes.
Family select_trellis_family(const Tuning& tuning, uint32_t tokens, uint64_t assignments, uint32_t experts);

/// Family that a user asked for by name: "moe_base", "base", either with "_fp32acc". std::invalid_argument listing the
/// names where there is none, or where the suffix asks for another accumulation than `fp32_accumulation`.
Family parse_family(std::string_view name, bool fp32_accumulation);

/// The same for a layer with quantised weights, which accumulates in fp32: `name` may also be the layer's own
/// (names_layer).
Family parse_layer_family(std::string_view name, uint32_t activation, const std::array<uint32_t, 3>& codes,
                          bool trellis);

/// Index into VARIANTS: the family at the row tile that suits `routed_rows` rows spread over `experts`.
uint32_t select_variant(const Tuning& tuning, Family family, uint64_t routed_rows, uint32_t experts);

} // namespace metal_moe
