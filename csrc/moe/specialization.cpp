#include "specialization.h"

#include "formats/matrix_code.h"
#include "moe/experts.h"

#include <atomic>
#include <cstdlib>
#include <iterator>

namespace metal_moe {

namespace {

std::atomic<bool>& enabled() {
  static std::atomic<bool> value = [] {
    const char* text = std::getenv("METAL_MOE_SPECIALIZE");
    return !text || std::string_view(text) != "0";
  }();
  return value;
}

/// By ExpertMatrix::format.
constexpr const char* FORMATS[] = {"", "affine", "mxfp4", "mxfp8", "nvfp4", "trellis", "dense"};
constexpr uint32_t AFFINE = 1, TRELLIS = 5;
constexpr const char* CODEBOOKS[] = {"3inst", "mcg", "mul1", "unknown"};
/// By Activation.
constexpr const char* ACTIVATIONS[] = {"swiglu", "geglu", "geglu_tanh", "relu2", "swiglu_clamp"};

const char* format_of(uint32_t code) {
  return code_format(code) < std::size(FORMATS) ? FORMATS[code_format(code)] : "unknown";
}

/// "6", "2.5".
std::string bits_of(uint32_t code) {
  const uint32_t half_bits = code_half_bits(code);
  return std::to_string(half_bits / 2) + (half_bits % 2 ? ".5" : "");
}

} // namespace

bool specialization_enabled() { return enabled().load(std::memory_order_relaxed); }
void enable_specialization(bool on) { enabled().store(on, std::memory_order_relaxed); }

uint32_t checked_matrix_code(uint32_t format, uint32_t half_bits, uint32_t group_size, uint32_t codebook,
                             uint32_t scale_type, bool aligned) {
  if (format == 0 || format >= std::size(FORMATS) || codebook >= std::size(CODEBOOKS) - 1)
    return 0;
  const uint32_t code = matrix_code(format, half_bits, group_size, codebook, scale_type, aligned);
  const bool fits = code_format(code) == format && code_half_bits(code) == half_bits &&
                    code_group_size(code) == group_size && code_codebook(code) == codebook &&
                    code_scale_type(code) == scale_type && code_aligned(code) == aligned;
  return fits ? code : 0;
}

std::string describe_code(uint32_t code) {
  const uint32_t format = code_format(code);
  std::string text = format_of(code);
  if (format == AFFINE)
    text += bits_of(code) + "g" + std::to_string(code_group_size(code));
  if (format == TRELLIS)
    text += bits_of(code) + "-" + CODEBOOKS[code_codebook(code)];
  return text;
}

std::string specialized_label(const char* kernel, const FunctionConstants& codes) {
  std::string label = kernel;
  for (const uint32_t code : codes.values)
    if (code)
      label.append(" ").append(describe_code(code));
  return label;
}

std::string layer_name(std::string_view family, uint32_t activation, const std::array<uint32_t, 3>& codes) {
  std::string format, bits;
  for (uint32_t part = 0; part < codes.size(); ++part) {
    if (part == 1 && activation == ACTIVATION_RELU2)
      continue;
    bits.append("_").append(codes[part] ? bits_of(codes[part]) : "any");
    if (codes[part]) {
      const std::string own = format_of(codes[part]);
      format = format.empty() || format == own ? own : "mixed";
    }
  }
  if (format.empty())
    return "";
  // Names know one kind of decode kernels, and no name for those between prefill4 and large_batch.
  family.remove_prefix(sizeof("moe") - 1);
  if (family.starts_with("_decode"))
    family = "_decode";
  if (family.starts_with("_base"))
    family.remove_prefix(sizeof("_base") - 1);
  return "moe_" + format + "_" + ACTIVATIONS[activation] + std::string(family) + bits;
}

} // namespace metal_moe
