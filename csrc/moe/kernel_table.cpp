#include "kernel_table.h"

#include "../core/pipeline_cache.h"
#include "formats/dequantize_trellis.h"
#include "formats/matrix_code.h"
#include "linear/lora.h"
#include "linear/matmul.h"
#include "moe/combine.h"
#include "moe/gather.h"
#include "moe/group.h"
#include "moe/rotate.h"
#include "moe/trellis_decode.h"
#include "moe/trellis_product.h"
#include "quantize/viterbi.h"

#include <algorithm>
#include <iterator>
#include <tuple>

namespace metal_moe {

static_assert(KERNELS <= PipelineCache::CAPACITY);

namespace {

constexpr const char* FAMILY_NAMES[FAMILIES][2] = {{"moe_decode", "moe_decode_fp32acc"},
                                                   {"moe_prefill4", "moe_prefill4_fp32acc"},
                                                   {"moe_base", "moe_base_fp32acc"},
                                                   {"moe_large_batch", "moe_large_batch_fp32acc"},
                                                   {"moe_simd", "moe_simd_fp32acc"}};
constexpr const char* STAGE_NAMES[] = {"gate_up",
                                       "up",
                                       "down",
                                       "route",
                                       "group",
                                       "pad_groups",
                                       "combine",
                                       "gather_experts",
                                       "dequantize_trellis",
                                       "viterbi",
                                       "trellis_product",
                                       "trellis_gate_up",
                                       "trellis_down",
                                       "rotate",
                                       "rotate_outputs",
                                       "matmul",
                                       "lora_shrink",
                                       "lora_expand"};
static_assert(std::size(STAGE_NAMES) == static_cast<size_t>(Stage::LoraExpand) + 1);
constexpr Dtype FLOATS[] = {Dtype::Fp32, Dtype::Fp16, Dtype::Bf16};

/// "gate_up_large_batch_fp32acc_m16_bf16": stage, family, accumulation, row tile, dtype; "gate_up_quantized_..." where
/// weights are quantised.
std::string expert_kernel_name(Stage stage, const Variant& variant, Dtype dtype, bool fp32_accumulation,
                               bool quantized) {
  const std::string family = family_name(variant.family, fp32_accumulation);
  return std::string(stage_name(stage)) + (quantized ? "_quantized" : "") + family.substr(sizeof("moe") - 1) +
         variant.row_suffix + "_" + dtype_name(dtype);
}

std::vector<KernelEntry> build_table() {
  std::vector<KernelEntry> table(KERNELS);
  for (uint32_t variant = 0; variant < VARIANTS.size(); ++variant)
    for (Stage stage : {Stage::GateUp, Stage::Up, Stage::Down}) {
      const auto add = [&](Dtype dtype, bool fp32) {
        table[expert_kernel(variant, stage, dtype, fp32)] = {
            expert_kernel_name(stage, VARIANTS[variant], dtype, fp32, false), stage, &VARIANTS[variant], dtype, fp32};
      };
      for (Dtype dtype : FLOATS)
        add(dtype, true);
      add(Dtype::Fp16, false);
    }
  for (uint32_t place = 0; place < QUANTIZED_VARIANTS.size(); ++place)
    for (Stage stage : {Stage::GateUp, Stage::Up, Stage::Down})
      for (Dtype dtype : FLOATS) {
        const Variant& variant = VARIANTS[QUANTIZED_VARIANTS[place]];
        table[quantized_kernel(place, stage, dtype)] = {
            expert_kernel_name(stage, variant, dtype, true, true), stage, &variant, dtype, true, true};
      }
  for (auto [index, stage] : {std::pair{ROUTE_KERNEL, Stage::Route},
                              {GROUP_KERNEL, Stage::Group},
                              {PAD_GROUPS_KERNEL, Stage::PadGroups},
                              {GATHER_KERNEL, Stage::Gather},
                              {DEQUANTIZE_TRELLIS_KERNEL, Stage::DequantizeTrellis},
                              {VITERBI_KERNEL, Stage::Viterbi}})
    table[index] = {stage_name(stage), stage, nullptr, Dtype::Other, false};
  for (auto [index, name, stage] : {std::tuple{TRELLIS_PRODUCT_M4_KERNEL, "trellis_product_m4", Stage::TrellisProduct},
                                    {TRELLIS_PRODUCT_M8_KERNEL, "trellis_product_m8", Stage::TrellisProduct},
                                    {TRELLIS_PRODUCT_M16_KERNEL, "trellis_product_m16", Stage::TrellisProduct},
                                    {TRELLIS_PRODUCT_M64_KERNEL, "trellis_product_m64", Stage::TrellisProduct},
                                    {TRELLIS_GATE_UP_DECODE_KERNEL, "trellis_gate_up_decode", Stage::TrellisGateUp},
                                    {TRELLIS_DOWN_DECODE_KERNEL, "trellis_down_decode", Stage::TrellisDown},
                                    {ROTATE_INPUTS_KERNEL, "rotate_inputs", Stage::Rotate},
                                    {ROTATE_ACTIVATIONS_KERNEL, "rotate_activations", Stage::Rotate},
                                    {UNROTATE_ACTIVATIONS_KERNEL, "unrotate_activations", Stage::Rotate},
                                    {ROTATE_INTERMEDIATE_KERNEL, "rotate_intermediate", Stage::Rotate},
                                    {ROTATE_OUTPUTS_KERNEL, "rotate_outputs", Stage::RotateOutputs}})
    table[index] = {name, stage, nullptr, Dtype::Other, false};
  for (Dtype dtype : FLOATS)
    table[combine_kernel(dtype)] = {std::string("combine_") + dtype_name(dtype), Stage::Combine, nullptr, dtype, false};
  for (Dtype dtype : FLOATS)
    for (bool tile : {false, true}) {
      const std::string type = std::string("_") + dtype_name(dtype), suffix = (tile ? "_tile" : "") + type;
      for (bool transposed : {false, true})
        table[matmul_kernel(tile, transposed, dtype)] = {std::string(tile ? "matmul_tile" : "matmul_gemv") +
                                                             (transposed ? "_nt" : "_nn") + type,
                                                         Stage::Matmul, nullptr, dtype, false};
      table[lora_shrink_kernel(tile, dtype)] = {"lora_shrink" + suffix, Stage::LoraShrink, nullptr, dtype, false};
      table[lora_expand_kernel(tile, dtype)] = {"lora_expand" + suffix, Stage::LoraExpand, nullptr, dtype, false};
    }
  return table;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names)
    text.append(text.empty() ? "" : ", ").append(name);
  return text;
}

} // namespace

std::span<const KernelEntry> kernel_table() {
  static const std::vector<KernelEntry> table = build_table();
  return table;
}

uint32_t coded_matrices(const KernelEntry& kernel) {
  if (kernel.stage == Stage::TrellisProduct || kernel.stage == Stage::TrellisGateUp)
    return 2;
  if (kernel.stage == Stage::TrellisDown)
    return 1;
  return !kernel.quantized ? 0 : kernel.stage == Stage::GateUp ? 2 : 1;
}

uint32_t packed_decode_simdgroups(const KernelEntry& kernel, const FunctionConstants& codes,
                                  uint32_t threadgroup_bytes) {
  const uint32_t code = codes.values[0], group = code_group_size(code);
  if (!kernel.quantized || kernel.variant->family != Family::Decode ||
      !code_is_packed(code, kernel.dtype == Dtype::Fp32 ? 4 : 2))
    return 0;
  if (kernel.stage == Stage::Down)
    return packed_down(group, code_short_rows(code), threadgroup_bytes).simdgroups;
  const bool same = kernel.stage == Stage::Up || codes.values[1] == code;
  return same ? packed_gate_up(group, coded_matrices(kernel), code_short_rows(code)).simdgroups : 0;
}

uint32_t kernel_simdgroups(const KernelEntry& kernel) {
  switch (kernel.stage) {
  case Stage::GateUp:
  case Stage::Up:
  case Stage::Down:
    if (kernel.variant->matrix)
      return GEMM_SIMDGROUPS;
    return kernel.variant->family == Family::Decode && kernel.stage == Stage::Down ? DOWN_DECODE_SIMDGROUPS
                                                                                   : GEMV_SIMDGROUPS;
  case Stage::Route:
    return ROUTE_SIMDGROUPS;
  case Stage::Group:
    return GROUP_MAX_SIMDGROUPS;
  case Stage::PadGroups:
    return PAD_SIMDGROUPS;
  case Stage::Combine:
    return COMBINE_SIMDGROUPS;
  case Stage::Gather:
    return GATHER_SIMDGROUPS;
  case Stage::DequantizeTrellis:
    return DEQUANTIZE_SIMDGROUPS;
  case Stage::Viterbi:
    return VITERBI_SIMDGROUPS;
  case Stage::TrellisProduct:
    return TRELLIS_PRODUCT_SIMDGROUPS;
  case Stage::TrellisGateUp:
  case Stage::TrellisDown:
    return TRELLIS_DECODE_SIMDGROUPS;
  case Stage::Rotate:
    return ROTATE_SIMDGROUPS;
  case Stage::RotateOutputs:
    return ROTATE_OUTPUT_SIMDGROUPS;
  case Stage::Matmul:
    return std::max(MATMUL_SIMDGROUPS, GEMM_SIMDGROUPS);
  case Stage::LoraShrink:
  case Stage::LoraExpand:
    return std::max(LORA_SIMDGROUPS, GEMM_SIMDGROUPS);
  }
  return 0; // no such stage
}

const char* family_name(Family family, bool fp32_accumulation) {
  return FAMILY_NAMES[static_cast<uint32_t>(family)][fp32_accumulation];
}

const char* stage_name(Stage stage) { return STAGE_NAMES[static_cast<uint32_t>(stage)]; }

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
  case Dtype::Fp32:
    return "fp32";
  case Dtype::Fp16:
    return "fp16";
  case Dtype::Bf16:
    return "bf16";
  default:
    return "";
  }
}

void check_kernel_table(std::span<const std::string> function_names, const std::string& library) {
  std::vector<std::string> expected, present(function_names.begin(), function_names.end()), missing, unknown;
  for (const KernelEntry& entry : kernel_table())
    expected.push_back(entry.name);
  std::sort(expected.begin(), expected.end());
  std::sort(present.begin(), present.end());
  std::set_difference(expected.begin(), expected.end(), present.begin(), present.end(), std::back_inserter(missing));
  std::set_difference(present.begin(), present.end(), expected.begin(), expected.end(), std::back_inserter(unknown));
  if (missing.empty() && unknown.empty())
    return;
  std::string message = "kernel library '" + library + "' does not match the kernel table";
  if (!missing.empty())
    message += "; missing: " + joined(missing);
  if (!unknown.empty())
    message += "; not in the table: " + joined(unknown);
  throw std::runtime_error(message);
}

} // namespace metal_moe
