#include "specialization.h"

#include "formats/matrix_code.h"
#include "moe/experts.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace metal_moe {

namespace {

std::atomic<bool>& enabled() {
  static std::atomic<bool> value = [] {
    const char* text = std::getenv("METAL_MOE_SPECIALIZE");
    return !text || std::string_view(text) != "0";
  }();
  return value;
}

constexpr uint32_t AFFINE = 1, TRELLIS = 5;
/// Formats that a code has room for.
constexpr uint32_t MAX_FORMATS = 16;

/// By ExpertMatrix::format; nullptr: not known. Names stay.
std::array<std::atomic<const char*>, MAX_FORMATS>& formats() {
  static std::array<std::atomic<const char*>, MAX_FORMATS> names{nullptr, "affine",  "mxfp4", "mxfp8",
                                                                 "nvfp4", "trellis", "dense"};
  return names;
}
constexpr const char* CODEBOOKS[] = {"3inst", "mcg", "mul1", "unknown"};
/// By Activation.
constexpr const char* ACTIVATIONS[] = {"swiglu", "geglu", "geglu_tanh", "relu2", "swiglu_clamp"};

const char* format_of(uint32_t code) {
  const char* name = formats()[code_format(code)].load(std::memory_order_acquire);
  return name ? name : "unknown";
}

/// "6", "2.5".
std::string bits_of(uint32_t code) {
  const uint32_t half_bits = code_half_bits(code);
  return std::to_string(half_bits / 2) + (half_bits % 2 ? ".5" : "");
}

/// Without a gate the first and the last part have the matrices.
bool is_part(uint32_t part, uint32_t activation) { return part != 1 || activation != ACTIVATION_RELU2; }

/// Of the parts that have a code; "mixed" where they differ, "" where none has one.
std::string common_format(uint32_t activation, const std::array<uint32_t, 3>& codes) {
  std::string format;
  for (uint32_t part = 0; part < codes.size(); ++part)
    if (codes[part] && is_part(part, activation)) {
      const std::string own = format_of(codes[part]);
      format = format.empty() || format == own ? own : "mixed";
    }
  return format;
}

/// "_6_2_3", "_4_any_4".
std::string bits_of_all(uint32_t activation, const std::array<uint32_t, 3>& codes) {
  std::string bits;
  for (uint32_t part = 0; part < codes.size(); ++part)
    if (is_part(part, activation))
      bits.append("_").append(codes[part] ? bits_of(codes[part]) : "any");
  return bits;
}

/// A layer's name up to its bits. Names know one kind of decode kernels, and no name for those between prefill4 and
/// large_batch.
std::string name_stem(const std::string& format, std::string_view family, uint32_t activation) {
  family.remove_prefix(sizeof("moe") - 1);
  if (family.starts_with("_decode"))
    family = "_decode";
  if (family.starts_with("_base"))
    family.remove_prefix(sizeof("_base") - 1);
  return "moe_" + format + "_" + ACTIVATIONS[activation] + std::string(family);
}

} // namespace

bool specialization_enabled() { return enabled().load(std::memory_order_relaxed); }
void enable_specialization(bool on) { enabled().store(on, std::memory_order_relaxed); }

void name_format(uint32_t number, std::string name) {
  if (number == 0 || number >= MAX_FORMATS)
    throw std::invalid_argument("format number is " + std::to_string(number) + ": must be from 1 to " +
                                std::to_string(MAX_FORMATS - 1));
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  std::atomic<const char*>& known = formats()[number];
  if (const char* now = known.load()) {
    if (now != name)
      throw std::invalid_argument("format number is " + std::to_string(number) + ", which is that of " + now +
                                  ", not of " + name);
    return;
  }
  known.store((new std::string(std::move(name)))->c_str(), std::memory_order_release);
}

uint32_t checked_matrix_code(uint32_t format, uint32_t half_bits, uint32_t group_size, uint32_t codebook,
                             uint32_t scale_type, bool aligned) {
  if (format >= MAX_FORMATS || !formats()[format].load(std::memory_order_acquire) ||
      codebook >= std::size(CODEBOOKS) - 1)
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
  const std::string format = common_format(activation, codes);
  return format.empty() ? "" : name_stem(format, family, activation) + bits_of_all(activation, codes);
}

bool names_layer(std::string_view name, std::string_view family, uint32_t activation,
                 const std::array<uint32_t, 3>& codes, bool trellis) {
  std::string format = common_format(activation, codes);
  const std::string bits = format.empty() ? "" : bits_of_all(activation, codes);
  if (format.empty() && trellis)
    format = format_of(TRELLIS);
  if (format.empty())
    return false;
  const std::string stem = name_stem(format, family, activation);
  constexpr std::string_view fp32 = "_fp32acc";
  const std::string_view shorter =
      std::string_view(stem).substr(0, stem.size() - (stem.ends_with(fp32) ? fp32.size() : 0));
  for (const std::string_view own : {std::string_view(stem), shorter})
    if (name.starts_with(own) && (name.size() == own.size() || name.substr(own.size()) == bits))
      return true;
  return false;
}

} // namespace metal_moe
