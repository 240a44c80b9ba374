// Kernels compiled for how a layer's quantised weights are stored: which layers have them, and what they are called.
#pragma once

#include "../core/pipeline_cache.h"

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace metal_moe {

/// Whether layers have kernels of their own where their experts are stored alike; otherwise kernels read how from each
/// expert's record. Initially not so if METAL_MOE_SPECIALIZE is "0". For all threads, from their next operation.
bool specialization_enabled();
void enable_specialization(bool enabled);

/// Makes a format known by the number that records have for it, 1 to 15; those of this project are. For all threads.
/// std::invalid_argument for other numbers, and for one that is another format's.
void name_format(uint32_t number, std::string name);

/// The code of a matrix with these fields of ExpertMatrix; 0 where they have none.
uint32_t checked_matrix_code(uint32_t format, uint32_t half_bits, uint32_t group_size, uint32_t codebook,
                             uint32_t scale_type, bool aligned);

/// "affine4g64", "mxfp4", "trellis2.5-mcg": how matrices of a code are stored.
std::string describe_code(uint32_t code);

/// "down_quantized_decode_fp32acc_bf16 affine4g64": a pipeline's kernel, and the codes it was compiled for.
std::string specialized_label(const char* kernel, const FunctionConstants& codes);

/// "moe_trellis_swiglu_decode_6_2_3": format, activation, `family` (of DispatchTrace), and bits by `codes` of gate, up
/// and down, with ACTIVATION_RELU2 of the first and the last; "any" for a part without a code. "" where none has one.
std::string layer_name(std::string_view family, uint32_t activation, const std::array<uint32_t, 3>& codes);

/// Whether `name` is the layer's in `family`, as layer_name gives it, or that without its bits, without "_fp32acc" or
/// without both. A layer whose experts differ has no bits, and is `trellis` where all of them are.
bool names_layer(std::string_view name, std::string_view family, uint32_t activation,
                 const std::array<uint32_t, 3>& codes, bool trellis);

} // namespace metal_moe
