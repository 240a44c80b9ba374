// Pipelines of one kernel for different weights, their names, and how many there may be.
#include "core_support.h"

#include "formats/matrix_code.h"

#include <set>
#include <thread>

namespace metal_moe::testing {
namespace {

constexpr uint32_t AFFINE = 1, MXFP4 = 2, TRELLIS = 5;
constexpr uint32_t SCALE_FP16 = 1, SCALE_E8M0 = 3;
const KernelIndex GATE_UP = quantized_kernel(0, Stage::GateUp, Dtype::Fp32);
const KernelIndex DOWN = quantized_kernel(0, Stage::Down, Dtype::Fp32);

uint32_t affine(uint32_t bits, uint32_t group) {
  return checked_matrix_code(AFFINE, 2 * bits, group, 0, SCALE_FP16, true);
}
uint32_t trellis(uint32_t half_bits, uint32_t codebook) {
  return checked_matrix_code(TRELLIS, half_bits, 128, codebook, SCALE_FP16, true);
}

TEST(MatrixCode, KeepsItsFields) {
  std::set<uint32_t> codes;
  for (uint32_t format = 1; format <= 6; ++format)
    for (uint32_t half_bits : {2u, 5u, 16u, 64u})
      for (uint32_t group : {16u, 32u, 64u, 128u})
        for (uint32_t codebook : {0u, 2u})
          for (uint32_t scale : {0u, 4u})
            for (bool aligned : {false, true}) {
              const uint32_t code = checked_matrix_code(format, half_bits, group, codebook, scale, aligned);
              EXPECT_EQ(code_format(code), format);
              EXPECT_EQ(code_half_bits(code), half_bits);
              EXPECT_EQ(code_group_size(code), group);
              EXPECT_EQ(code_codebook(code), codebook);
              EXPECT_EQ(code_scale_type(code), scale);
              EXPECT_EQ(code_aligned(code), aligned);
              EXPECT_TRUE(codes.insert(code).second) << code;
            }
  EXPECT_EQ(codes.count(0), 0u);
}

TEST(MatrixCode, WhatHasNoPlaceInOneHasNone) {
  EXPECT_EQ(checked_matrix_code(0, 8, 64, 0, 1, true), 0u);
  EXPECT_EQ(checked_matrix_code(7, 8, 64, 0, 1, true), 0u);
  EXPECT_EQ(checked_matrix_code(AFFINE, 128, 64, 0, 1, true), 0u);
  EXPECT_EQ(checked_matrix_code(AFFINE, 8, 96, 0, 1, true), 0u);
  EXPECT_EQ(checked_matrix_code(AFFINE, 8, 256, 0, 1, true), 0u);
  EXPECT_EQ(checked_matrix_code(TRELLIS, 8, 128, 3, 1, true), 0u);
  EXPECT_EQ(checked_matrix_code(AFFINE, 8, 64, 0, 8, true), 0u);
}

TEST(Specialization, LayersHaveThePublishedNames) {
  const std::array<uint32_t, 3> published = {trellis(12, 2), trellis(4, 2), trellis(6, 2)};
  EXPECT_EQ(layer_name("moe_decode_fp32acc", ACTIVATION_SILU, published), "moe_trellis_swiglu_decode_6_2_3");
  EXPECT_EQ(layer_name("moe_prefill4_fp32acc", ACTIVATION_SILU, published),
            "moe_trellis_swiglu_prefill4_fp32acc_6_2_3");
  EXPECT_EQ(layer_name("moe_base_fp32acc", ACTIVATION_SILU, published), "moe_trellis_swiglu_fp32acc_6_2_3");
  EXPECT_EQ(layer_name("moe_large_batch_fp32acc", ACTIVATION_GELU, {affine(4, 32), affine(8, 64), 0}),
            "moe_affine_geglu_large_batch_fp32acc_4_8_any");
  const uint32_t mxfp4 = checked_matrix_code(MXFP4, 8, 32, 0, SCALE_E8M0, true);
  EXPECT_EQ(layer_name("moe_decode_fp32acc", ACTIVATION_RELU2, {mxfp4, 0, affine(3, 64)}),
            "moe_mixed_relu2_decode_4_3");
  EXPECT_EQ(layer_name("moe_decode_fp32acc", ACTIVATION_SILU, {trellis(5, 2), trellis(16, 0), trellis(2, 1)}),
            "moe_trellis_swiglu_decode_2.5_8_1");
  EXPECT_EQ(layer_name("moe_decode_fp32acc", ACTIVATION_SILU, {}), "");
  EXPECT_EQ(layer_name("", 0, {}), "");
}

TEST(Specialization, FormatsHaveNamesOfTheirOwn) {
  EXPECT_EQ(checked_matrix_code(15, 8, 32, 0, 0, true), 0u) << "not known yet";
  name_format(15, "fifteen");
  name_format(15, "fifteen");
  name_format(1, "affine");
  const uint32_t code = checked_matrix_code(15, 8, 32, 0, 0, true);
  EXPECT_EQ(describe_code(code), "fifteen");
  EXPECT_EQ(layer_name("moe_prefill4_fp32acc", ACTIVATION_SILU, {code, code, code}),
            "moe_fifteen_swiglu_prefill4_fp32acc_4_4_4");
  EXPECT_THROW(name_format(15, "other"), std::invalid_argument);
  EXPECT_THROW(name_format(0, "none"), std::invalid_argument);
  EXPECT_THROW(name_format(16, "sixteen"), std::invalid_argument);
}

TEST(Specialization, LayersAreAskedForByName) {
  const std::array<uint32_t, 3> codes{trellis(12, 2), trellis(4, 2), trellis(6, 2)}, none{};
  const auto family = [](std::string_view name, const std::array<uint32_t, 3>& of, bool all_trellis,
                         uint32_t activation = ACTIVATION_SILU) {
    return parse_layer_family(name, activation, of, all_trellis);
  };
  EXPECT_EQ(family("moe_trellis_swiglu_decode_6_2_3", codes, true), Family::Decode);
  EXPECT_EQ(family("moe_trellis_swiglu_decode", codes, true), Family::Decode);
  EXPECT_EQ(family("moe_trellis_swiglu_prefill4", codes, true), Family::Prefill4);
  EXPECT_EQ(family("moe_trellis_swiglu_prefill4_fp32acc_6_2_3", codes, true), Family::Prefill4);
  EXPECT_EQ(family("moe_trellis_swiglu", codes, true), Family::Base);
  EXPECT_EQ(family("moe_trellis_swiglu_fp32acc", codes, true), Family::Base);
  EXPECT_EQ(family("moe_trellis_swiglu_large_batch", codes, true), Family::LargeBatch);
  EXPECT_EQ(family("moe_trellis_swiglu_simd_6_2_3", codes, true), Family::Simd);
  EXPECT_EQ(family("base", codes, true), Family::Base) << "as ever";
  EXPECT_EQ(family("moe_trellis_swiglu_decode", none, true), Family::Decode) << "experts that differ";
  EXPECT_EQ(family("moe_affine_relu2_decode_4_8", {affine(4, 32), 0, affine(8, 32)}, false, ACTIVATION_RELU2),
            Family::Decode);
  EXPECT_EQ(family("moe_mixed_swiglu_decode_6_any_4", {codes[0], 0, affine(4, 32)}, false), Family::Decode);
  for (const char* name :
       {"moe_trellis_swiglu_decode_6_3_4", "moe_affine_swiglu_decode_6_2_3", "moe_trellis_geglu_decode",
        "moe_trellis_swiglu_decode_6_2", "moe_trellis_swiglu_decode_6_2_33", "moe_trellis_swiglu_d"})
    EXPECT_THROW(family(name, codes, true), std::invalid_argument) << name;
  EXPECT_THROW(family("moe_trellis_swiglu_decode_6_2_3", none, true), std::invalid_argument)
      << "no kernel of these bits";
  EXPECT_THROW(family("moe_affine_swiglu_decode", none, false), std::invalid_argument);
}

TEST(Specialization, PipelinesAreTheKernelsForTheirCodes) {
  for (const char* name : {"native", "exact"}) {
    MoeEngine& on = engine(name);
    const FunctionConstants codes{{affine(6, 64), affine(2, 32)}}, others{{affine(2, 32), affine(6, 64)}};
    const Pipeline& one = on.pipeline(GATE_UP, codes);
    EXPECT_EQ(&one, &on.pipeline(GATE_UP, codes)) << "cached";
    EXPECT_NE(&one, &on.pipeline(GATE_UP, others));
    EXPECT_NE(&one, &on.pipeline(GATE_UP));
    EXPECT_EQ(one.name, kernel_table()[GATE_UP].name);
    EXPECT_EQ(one.constants, codes);
    EXPECT_STREQ(one.state->label()->utf8String(), "gate_up_quantized_decode_fp32acc_fp32 affine6g64 affine2g32");
    EXPECT_STREQ(on.pipeline(DOWN, {{trellis(5, 2)}}).state->label()->utf8String(),
                 "down_quantized_decode_fp32acc_fp32 trellis2.5-mul1");
    EXPECT_STREQ(on.pipeline(DOWN).state->label()->utf8String(), "down_quantized_decode_fp32acc_fp32");
  }
}

TEST(Specialization, ThreadsShareThem) {
  MoeEngine own("native", METAL_MOE_TEST_LIBRARY);
  constexpr uint32_t CODES = 40;
  std::array<std::array<const Pipeline*, CODES>, 4> found{};
  std::vector<std::thread> workers;
  for (auto& mine : found)
    workers.emplace_back([&own, &mine] {
      for (uint32_t code = 1; code <= CODES; ++code)
        mine[code - 1] = &own.pipeline(DOWN, {{code}});
    });
  for (std::thread& worker : workers)
    worker.join();
  for (const auto& mine : found)
    EXPECT_EQ(mine, found[0]);
  EXPECT_EQ(std::set<const Pipeline*>(found[0].begin(), found[0].end()).size(), CODES);
  EXPECT_EQ(own.context().pipelines().specialized(), CODES);
}

TEST(Specialization, BeyondTheLimitTheGenericKernelRuns) {
  MoeEngine own("native", METAL_MOE_TEST_LIBRARY);
  for (uint32_t code = 1; code <= PipelineCache::MAX_SPECIALIZED; ++code)
    EXPECT_EQ(own.pipeline(DOWN, {{code}}).constants.values[0], code);
  const Pipeline& beyond = own.pipeline(DOWN, {{PipelineCache::MAX_SPECIALIZED + 1}});
  EXPECT_EQ(&beyond, &own.pipeline(DOWN));
  EXPECT_EQ(beyond.constants, FunctionConstants{});
  EXPECT_EQ(own.pipeline(DOWN, {{7}}).constants.values[0], 7u) << "those there are stay";
  EXPECT_EQ(own.context().pipelines().specialized(), PipelineCache::MAX_SPECIALIZED);
}

TEST(Specialization, CanBeSwitchedOff) {
  EXPECT_TRUE(specialization_enabled());
  enable_specialization(false);
  EXPECT_FALSE(specialization_enabled());
  enable_specialization(true);
}

} // namespace
} // namespace metal_moe::testing
