// The one list of kernels: what exists, what each is for, and the number under which its pipeline is cached.
// Selection, encoding, the listing for users and the tests read it; it is checked against the compiled library when an
// engine is made.
#pragma once

#include "types.h"

#include "moe/experts.h"

#include <array>
#include <span>
#include <string>
#include <vector>

namespace metal_moe {

/// How the experts of a layer are computed; see the table of families in docs/architecture.md.
enum class Family : uint8_t { Decode, Prefill4, Base, LargeBatch, Simd };
constexpr uint32_t FAMILIES = 5;

enum class Stage : uint8_t {
  GateUp,
  Up,
  Down,
  Route,
  Group,
  PadGroups,
  Combine,
  Gather,
  DequantizeTrellis,
  Viterbi,
  TrellisProduct,
  TrellisGateUp,
  TrellisDown,
  Rotate,
  RotateOutputs,
  Matmul,
  LoraShrink,
  LoraExpand
};

/// A family at one row tile: what the expert kernels are compiled for.
struct Variant {
  Family family;
  uint32_t row_tile; // rows of one expert per threadgroup
  /// Output columns per threadgroup; in GEMV families on a GPU several threadgroups share them, in matrix families
  /// these are weight rows: of gate_up half as many columns.
  uint32_t tile_n;
  bool matrix; // 8x8 simdgroup matrices, see gemm.h; else dot products, see gemv.h
  bool stages_weights;
  const char* row_suffix; // in kernel names, where a family has several row tiles
};

/// In order of family, then row tile.
inline constexpr std::array<Variant, 10> VARIANTS{{
    {Family::Decode, 1, GEMV_TILE_N, false, false, ""},
    {Family::Prefill4, PREFILL4_ROW_TILE, GEMV_TILE_N, false, false, ""},
    {Family::Base, BASE_ROW_TILE, BASE_TILE_N, true, true, ""},
    {Family::LargeBatch, 16, LARGE_BATCH_TILE_N, true, true, "_m16"},
    {Family::LargeBatch, 32, LARGE_BATCH_TILE_N, true, true, "_m32"},
    {Family::LargeBatch, 64, LARGE_BATCH_TILE_N, true, true, "_m64"},
    {Family::LargeBatch, 128, LARGE_BATCH_TILE_N, true, true, "_m128"},
    {Family::Simd, 8, SIMD_TILE_N, true, false, "_m8"},
    {Family::Simd, 16, SIMD_TILE_N, true, false, "_m16"},
    {Family::Simd, 32, SIMD_TILE_N, true, false, "_m32"},
}};

/// The variants that kernels of quantised weights exist for, as indices into VARIANTS: decode, prefill4, base,
/// large_batch at 16 and 64 rows.
inline constexpr std::array<uint32_t, 5> QUANTIZED_VARIANTS{0, 1, 2, 3, 5};

/// Place in QUANTIZED_VARIANTS of what runs for a variant on quantised weights: the next row tile that exists. `simd`,
/// whose weights are not staged, has the kernels of base and large_batch.
constexpr uint32_t quantized_variant(uint32_t variant) {
  const Variant& wanted = VARIANTS[variant];
  if (!wanted.matrix)
    return variant;
  return wanted.row_tile <= BASE_ROW_TILE ? 2 : wanted.row_tile <= 16 ? 3 : 4;
}

struct KernelEntry {
  std::string name;
  Stage stage;
  const Variant* variant; // null: not an expert kernel
  Dtype dtype;            // Other: any
  bool fp32_accumulation; // expert kernels only
  bool quantized = false; // of weights in any of kernels/formats, by record; else dense
};

/// A place in the table; also the pipeline's number.
using KernelIndex = uint32_t;

constexpr KernelIndex EXPERT_STAGES = 3;     // GateUp, Up, Down
constexpr KernelIndex EXPERT_PRECISIONS = 4; // fp32, fp16, bf16 with fp32 accumulation; fp16 with fp16 accumulation
constexpr KernelIndex EXPERT_KERNELS = VARIANTS.size() * EXPERT_STAGES * EXPERT_PRECISIONS;
constexpr KernelIndex QUANTIZED_PRECISIONS = 3; // fp32, fp16, bf16, all with fp32 accumulation
constexpr KernelIndex QUANTIZED_KERNELS = QUANTIZED_VARIANTS.size() * EXPERT_STAGES * QUANTIZED_PRECISIONS;
constexpr KernelIndex ROUTE_KERNEL = EXPERT_KERNELS + QUANTIZED_KERNELS;
constexpr KernelIndex GROUP_KERNEL = ROUTE_KERNEL + 1;
constexpr KernelIndex PAD_GROUPS_KERNEL = ROUTE_KERNEL + 2;
constexpr KernelIndex GATHER_KERNEL = ROUTE_KERNEL + 3;
constexpr KernelIndex COMBINE_KERNELS = ROUTE_KERNEL + 4; // fp32, fp16, bf16
constexpr KernelIndex DEQUANTIZE_TRELLIS_KERNEL = COMBINE_KERNELS + 3;
constexpr KernelIndex VITERBI_KERNEL = COMBINE_KERNELS + 4;
constexpr KernelIndex TRELLIS_PRODUCT_M4_KERNEL = COMBINE_KERNELS + 5;
constexpr KernelIndex TRELLIS_GATE_UP_DECODE_KERNEL = COMBINE_KERNELS + 6;
constexpr KernelIndex TRELLIS_DOWN_DECODE_KERNEL = COMBINE_KERNELS + 7;
constexpr KernelIndex ROTATE_INPUTS_KERNEL = COMBINE_KERNELS + 8;
constexpr KernelIndex ROTATE_ACTIVATIONS_KERNEL = COMBINE_KERNELS + 9;
constexpr KernelIndex ROTATE_OUTPUTS_KERNEL = COMBINE_KERNELS + 10;
constexpr KernelIndex TRELLIS_PRODUCT_M8_KERNEL = COMBINE_KERNELS + 11;
constexpr KernelIndex TRELLIS_PRODUCT_M16_KERNEL = COMBINE_KERNELS + 12;
constexpr KernelIndex UNROTATE_ACTIVATIONS_KERNEL = COMBINE_KERNELS + 13;
constexpr KernelIndex ROTATE_INTERMEDIATE_KERNEL = COMBINE_KERNELS + 14;
constexpr KernelIndex TRELLIS_PRODUCT_M64_KERNEL = COMBINE_KERNELS + 15;
constexpr KernelIndex MATMUL_KERNELS = COMBINE_KERNELS + 16;            // gemv and tile, nn and nt, fp32, fp16, bf16
constexpr KernelIndex LORA_SHRINK_KERNELS = MATMUL_KERNELS + 2 * 2 * 3; // fp32, fp16, bf16; then the same as tiles
constexpr KernelIndex LORA_EXPAND_KERNELS = LORA_SHRINK_KERNELS + 2 * 3;
constexpr KernelIndex KERNELS = LORA_EXPAND_KERNELS + 2 * 3;

/// Kernel of a variant (index into VARIANTS), an expert stage and a dtype. fp16 accumulation exists for fp16 only.
constexpr KernelIndex expert_kernel(uint32_t variant, Stage stage, Dtype dtype, bool fp32_accumulation) {
  const uint32_t precision = fp32_accumulation ? static_cast<uint32_t>(dtype) : 3;
  return (variant * EXPERT_STAGES + static_cast<uint32_t>(stage)) * EXPERT_PRECISIONS + precision;
}
/// Kernel of quantised weights; `place`: see quantized_variant.
constexpr KernelIndex quantized_kernel(uint32_t place, Stage stage, Dtype dtype) {
  return EXPERT_KERNELS + (place * EXPERT_STAGES + static_cast<uint32_t>(stage)) * QUANTIZED_PRECISIONS +
         static_cast<uint32_t>(dtype);
}
constexpr KernelIndex combine_kernel(Dtype dtype) { return COMBINE_KERNELS + static_cast<uint32_t>(dtype); }
/// `tile`: simdgroup matrices, else dot products; `transposed`: of b's transpose.
constexpr KernelIndex matmul_kernel(bool tile, bool transposed, Dtype dtype) {
  return MATMUL_KERNELS + (tile * 2u + transposed) * 3 + static_cast<uint32_t>(dtype);
}
constexpr KernelIndex lora_shrink_kernel(bool tile, Dtype dtype) {
  return LORA_SHRINK_KERNELS + tile * 3u + static_cast<uint32_t>(dtype);
}
constexpr KernelIndex lora_expand_kernel(bool tile, Dtype dtype) {
  return LORA_EXPAND_KERNELS + tile * 3u + static_cast<uint32_t>(dtype);
}

/// All kernels by index. The strings live as long as the program.
std::span<const KernelEntry> kernel_table();

/// Matrices of an expert whose codes (kernels/formats/matrix_code.h) are function constants of the kernel: 0 to 2.
uint32_t coded_matrices(const KernelEntry& kernel);

/// The most simdgroups of a threadgroup of the kernel, on a GPU.
uint32_t kernel_simdgroups(const KernelEntry& kernel);

/// Simdgroups of a decode kernel of matrices with `codes` as a packed product, where the device has those; 0: it is
/// none.
uint32_t packed_decode_simdgroups(const KernelEntry& kernel, const FunctionConstants& codes,
                                  uint32_t threadgroup_bytes);

/// "moe_decode", ...; with "_fp32acc" for fp32 accumulation.
const char* family_name(Family family, bool fp32_accumulation);
const char* stage_name(Stage stage);
/// "fp32", "fp16", "bf16"; "" for every other.
const char* dtype_name(Dtype dtype);

/// Compares the table with the functions of a compiled library. std::runtime_error naming what is in one and not in
/// the other, and `library`.
void check_kernel_table(std::span<const std::string> function_names, const std::string& library);

} // namespace metal_moe
