// Kernel table, selection and plan: names, thresholds, tiles, limits.
#include "core_support.h"
#include "formats/matrix_code.h"

#include "moe/group.h"
#include "moe/trellis_product.h"
#include "moe/trellis_slices.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>

namespace metal_moe::testing {
namespace {

TEST(KernelTable, NamesAreUniqueAndDescribeTheKernel) {
  std::set<std::string> names;
  for (const KernelEntry& entry : kernel_table())
    EXPECT_TRUE(names.insert(entry.name).second) << entry.name;
  EXPECT_EQ(names.size(), KERNELS);
  for (const char* name : {"gate_up_decode_bf16", "gate_up_decode_fp32acc_bf16", "up_prefill4_fp32acc_fp32",
                           "down_base_fp16", "gate_up_large_batch_fp32acc_m16_bf16", "down_large_batch_m32_fp16",
                           "up_simd_fp32acc_m8_fp32", "route", "group", "pad_groups", "combine_bf16", "gather_experts"})
    EXPECT_EQ(names.count(name), std::string(name) == "gate_up_decode_bf16" ? 0u : 1u) << name;
}

TEST(KernelTable, IndexAndEntryAgree) {
  for (uint32_t variant = 0; variant < VARIANTS.size(); ++variant)
    for (Stage stage : {Stage::GateUp, Stage::Up, Stage::Down})
      for (Dtype dtype : {Dtype::Fp32, Dtype::Fp16, Dtype::Bf16})
        for (bool fp32 : {true, false}) {
          if (!fp32 && dtype != Dtype::Fp16)
            continue;
          const KernelEntry& entry = kernel_table()[expert_kernel(variant, stage, dtype, fp32)];
          EXPECT_EQ(entry.variant, &VARIANTS[variant]);
          EXPECT_EQ(entry.stage, stage);
          EXPECT_EQ(entry.dtype, dtype);
          EXPECT_EQ(entry.fp32_accumulation, fp32);
        }
  EXPECT_EQ(kernel_table()[combine_kernel(Dtype::Bf16)].name, "combine_bf16");
}

TEST(KernelTable, EveryKernelOfTheLibraryHasAPipeline) {
  for (const char* name : {"native", "exact"}) {
    MoeEngine& on = engine(name);
    EXPECT_NO_THROW(check_kernel_table(on.context().library().function_names(), "library"));
    for (KernelIndex i = 0; i < KERNELS; ++i) {
      const Pipeline& pipeline = on.pipeline(i);
      EXPECT_EQ(pipeline.name, kernel_table()[i].name);
      EXPECT_EQ(&pipeline, &on.pipeline(i)) << "cached";
    }
  }
}

TEST(KernelTable, ADifferentLibraryIsRefusedByName) {
  auto names = engine("native").context().library().function_names();
  std::erase(names, "route");
  names.push_back("rout");
  try {
    check_kernel_table(names, "some.metallib");
    FAIL() << "no exception";
  } catch (const std::runtime_error& error) {
    EXPECT_EQ(std::string(error.what()), "kernel library 'some.metallib' does not match the kernel table; "
                                         "missing: route; not in the table: rout");
  }
}

TEST(Context, ErrorsNameDeviceAndLibrary) {
  try {
    Context("metal9", METAL_MOE_TEST_LIBRARY);
    FAIL() << "no exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("'metal9'"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("native"), std::string::npos) << error.what();
  }
  try {
    Context("native", "/nowhere/at.metallib");
    FAIL() << "no exception";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("/nowhere/at.metallib"), std::string::npos) << error.what();
  }
  EXPECT_THROW(engine("native").context().pipelines().get(KERNELS, {"no_such_kernel", 1}), std::runtime_error);
}

TEST(Selection, FollowsThePublishedTable) {
  const std::map<int64_t, std::pair<std::string, uint32_t>> table = {
      {0, {"moe_decode", 64}},        {1, {"moe_decode", 64}},          {2, {"moe_prefill4", 64}},
      {16, {"moe_prefill4", 64}},     {17, {"moe_base", 64}},           {32, {"moe_base", 64}},
      {33, {"moe_large_batch", 128}}, {4096, {"moe_large_batch", 128}}, {int64_t(1) << 40, {"moe_large_batch", 128}}};
  for (const auto& [batch_size, expected] : table)
    for (bool fp32 : {false, true}) {
      const Selection got = select_moe_kernel(batch_size, fp32, {}, 16, 32);
      EXPECT_EQ(got.name, expected.first + (fp32 ? "_fp32acc" : "")) << batch_size;
      EXPECT_EQ(got.tile_n, expected.second) << batch_size;
      EXPECT_NO_THROW(parse_family(got.name, true)) << "every name it returns exists";
    }
}

TEST(Selection, QuantizedWeightsHaveThePublishedNames) {
  const std::map<int64_t, std::tuple<std::string, std::string, uint32_t, uint32_t>> table = {
      {0, {"_decode_6_2_3", "_decode_6_2_3", 64, 64}},
      {1, {"_decode_6_2_3", "_decode_6_2_3", 64, 64}},
      {2, {"_prefill4", "_prefill4_fp32acc", 64, 64}},
      {16, {"_prefill4", "_prefill4_fp32acc", 64, 64}},
      {17, {"", "_fp32acc", 64, 64}},
      {32, {"", "_fp32acc", 64, 64}},
      {33, {"_large_batch", "_fp32acc", 128, 64}},
      {4096, {"_large_batch", "_fp32acc", 128, 64}}};
  for (const auto& [batch_size, expected] : table) {
    const auto& [fp16_name, fp32_name, fp16_tile, fp32_tile] = expected;
    const Selection fp16 = select_moe_kernel(batch_size, false, 6, 2, 3);
    const Selection fp32 = select_moe_kernel(batch_size, true, 6, 2, 3);
    EXPECT_EQ(fp16.name, "moe_trellis_swiglu" + fp16_name) << batch_size;
    EXPECT_EQ(fp32.name, "moe_trellis_swiglu" + fp32_name) << batch_size;
    EXPECT_EQ(fp16.tile_n, fp16_tile) << batch_size;
    EXPECT_EQ(fp32.tile_n, fp32_tile) << batch_size;
  }
  EXPECT_EQ(select_moe_kernel(1, true, 2.5, 3, 7.5).name, "moe_trellis_swiglu_decode_2.5_3_7.5");
  EXPECT_EQ(select_moe_kernel(1, true, 6, 2, {}).name, "moe_trellis_swiglu_decode");
  EXPECT_EQ(select_moe_kernel(1, true, 16, 16, 4).name, "moe_trellis_swiglu_decode");
}

TEST(Selection, RefusesWhatItCannotServe) {
  EXPECT_THROW(select_moe_kernel(-1, true, {}, {}, {}), std::invalid_argument);
  for (const double bits : {0.5, 2.25, 8.5, 24.0, -4.0, double(NAN), double(INFINITY)})
    EXPECT_THROW(select_moe_kernel(1, true, {}, bits, {}), std::invalid_argument) << bits;
  try {
    select_moe_kernel(1, true, 16, 9, 4);
    FAIL() << "no exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(std::string(error.what()),
              "up_bits is 9: must be None, 16 or 32 (dense) or 1 to 8 in halves (quantised)");
  }
}

TEST(Selection, FamiliesByName) {
  EXPECT_EQ(parse_family("moe_decode", false), Family::Decode);
  EXPECT_EQ(parse_family("moe_decode", true), Family::Decode);
  EXPECT_EQ(parse_family("large_batch_fp32acc", true), Family::LargeBatch);
  EXPECT_EQ(parse_family("moe_simd", true), Family::Simd);
  EXPECT_THROW(parse_family("moe_simd_fp32acc", false), std::invalid_argument);
  for (const char* name : {"", "moe_", "moe", "moe_decode_", "decode_fp16", "Moe_Decode"})
    EXPECT_THROW(parse_family(name, true), std::invalid_argument) << name;
}

TEST(Selection, FewTokensOfQuantizedWeightsAreDecode) {
  const Tuning& cuda = tuning_for("cuda");
  const auto quantized = [&](const Tuning& tuning, uint32_t tokens, uint32_t top_k, uint32_t experts, bool packed) {
    return select_quantized_family(tuning, tokens, uint64_t(tokens) * top_k, experts, packed);
  };
  EXPECT_EQ(quantized(cuda, 1, 2, 2, true), Family::Decode);
  EXPECT_EQ(quantized(cuda, 24, 8, 128, false), Family::Decode);
  EXPECT_EQ(quantized(cuda, 25, 8, 128, false), Family::Base) << "tokens";
  EXPECT_EQ(quantized(cuda, 16, 2, 8, false), Family::Decode);
  EXPECT_EQ(quantized(cuda, 17, 2, 8, false), Family::Base) << "rows of an expert";
  EXPECT_EQ(quantized(cuda, 22, 2, 8, false), Family::LargeBatch);
  EXPECT_EQ(quantized(cuda, 3, 2, 8, true), Family::Decode);
  EXPECT_EQ(quantized(cuda, 4, 2, 8, true), Family::Base);
  EXPECT_EQ(quantized(cuda, 3, 2, 4, true), Family::Base);

  const auto trellis = [&](const Tuning& tuning, uint32_t tokens, uint32_t top_k, uint32_t experts) {
    return select_trellis_family(tuning, tokens, uint64_t(tokens) * top_k, experts);
  };
  EXPECT_EQ(trellis(cuda, 1, 2, 2), Family::Decode);
  EXPECT_EQ(trellis(cuda, 2, 2, 8), Family::Decode);
  EXPECT_EQ(trellis(cuda, 3, 2, 8), Family::Prefill4);
  EXPECT_EQ(trellis(cuda, 8, 8, 128), Family::Decode);
  EXPECT_EQ(trellis(cuda, 9, 8, 128), Family::Prefill4);

  EXPECT_EQ(quantized(tuning_for("native"), 8, 2, 8, true), Family::Decode);
  for (const char* engine : {"native", "exact", "metal"}) {
    EXPECT_EQ(quantized(tuning_for(engine), 1, 2, 8, false), Family::Decode) << engine;
    EXPECT_EQ(quantized(tuning_for(engine), 2, 2, 8, false), Family::Prefill4) << engine;
    EXPECT_EQ(quantized(tuning_for(engine), 9, 2, 8, true), Family::Prefill4) << engine;
    EXPECT_EQ(trellis(tuning_for(engine), 2, 2, 8), Family::Prefill4) << engine;
  }
}

TEST(Selection, RowTileFollowsRowsPerExpert) {
  const Tuning tuning;
  const auto row_tile = [&](Family family, uint64_t rows, uint32_t experts) {
    return VARIANTS[select_variant(tuning, family, rows, experts)].row_tile;
  };
  EXPECT_EQ(row_tile(Family::LargeBatch, 64 * 16, 64), 16u);
  EXPECT_EQ(row_tile(Family::LargeBatch, 64 * 16 + 1, 64), 32u);
  EXPECT_EQ(row_tile(Family::LargeBatch, 1 << 20, 1), tuning.largest_row_tile);
  EXPECT_EQ(row_tile(Family::Simd, 8, 1), 8u);
  EXPECT_EQ(row_tile(Family::Simd, 16, 1), 16u);
  EXPECT_EQ(row_tile(Family::Simd, 1 << 20, 1), 32u);
  EXPECT_EQ(row_tile(Family::Base, 1 << 20, 1), BASE_ROW_TILE);
  EXPECT_EQ(row_tile(Family::Decode, 1 << 20, 1), 1u);
}

TEST(Plan, TileTableHoldsEveryRouting) {
  std::mt19937 random(7);
  for (int trial = 0; trial < 20000; ++trial) {
    const uint32_t experts = 1 + random() % 12, row_tile = 1 + random() % 9, rows = random() % 60;
    std::vector<uint32_t> count(experts);
    for (uint32_t r = 0; r < rows; ++r)
      count[random() % (1 + random() % experts)] += 1;
    uint32_t tiles = 0;
    for (uint32_t c : count)
      tiles += ceil_div(c, row_tile);
    ASSERT_LE(tiles, max_row_tiles(rows, row_tile, experts)) << rows << " rows, " << experts << " experts";
  }
  // Tight: one row each in all experts but one, which has the rest.
  EXPECT_EQ(max_row_tiles(16, 4, 4), 7u);
  EXPECT_EQ(max_row_tiles(0, 4, 4), 0u);
  EXPECT_EQ(max_row_tiles(5, 4, 1), 2u);
}

LayerShape glm() {
  LayerShape shape;
  shape.tokens = 128;
  shape.hidden = 2048;
  shape.intermediate = 1536;
  shape.experts = 64;
  shape.top_k = 4;
  shape.shared = 1;
  shape.shared_intermediate = 1540;
  shape.dtype = Dtype::Bf16;
  return shape;
}

TEST(Plan, SizesOfARealLayer) {
  const ExpertsPlan plan = plan_experts({}, Family::LargeBatch, glm(), false);
  EXPECT_TRUE(plan.fp32_accumulation) << "bf16 has no other";
  EXPECT_EQ(kernel_table()[plan.gate_up].name, "gate_up_large_batch_fp32acc_m16_bf16");
  EXPECT_EQ(kernel_table()[plan.down].name, "down_large_batch_fp32acc_m16_bf16");
  EXPECT_EQ(plan.rows, 128u * 5);
  EXPECT_EQ(plan.h_row_stride, 1544u);
  EXPECT_EQ(plan.gate_up_blocks, 25u); // half of the weight rows of a threadgroup are gate rows
  EXPECT_EQ(plan.down_blocks, 16u);
  EXPECT_EQ(plan.h_bytes, size_t(640) * 1544 * 2);
  EXPECT_EQ(plan.y_bytes, size_t(640) * 2048 * 4);
  EXPECT_EQ(plan.down_weight_bytes, (size_t(64) * 1536 + 1540) * 2048 * 2);
}

TEST(Plan, EveryVariantFitsTheThreadgroupMemoryOfEveryDevice) {
  for (Family family : {Family::Decode, Family::Prefill4, Family::Base, Family::LargeBatch, Family::Simd})
    for (uint32_t tokens : {1u, 64u, 128u, 512u, 4096u}) {
      LayerShape shape = glm();
      shape.tokens = tokens;
      const ExpertsPlan plan = plan_experts({}, family, shape, true);
      EXPECT_LE(plan.gate_up_bytes, 32768u);
      EXPECT_LE(plan.down_bytes, 32768u);
      EXPECT_EQ(plan.grouped, family != Family::Decode);
    }
}

TEST(Plan, PackedProductsHaveGridsOfTheirOwn) {
  LayerShape shape = glm();
  shape.quantized_gate_up_bytes = shape.quantized_down_bytes = 1;
  shape.packed_gate_up_group = 64;
  const auto plan = [&](Family family, uint32_t threadgroup_bytes) {
    Tuning tuning;
    tuning.threadgroup_bytes = threadgroup_bytes;
    return plan_experts(tuning, family, shape, true);
  };
  const ExpertsPlan base = plan(Family::Base, 100 << 10);
  EXPECT_EQ(base.gate_up_blocks, 25u); // 1540 columns, 64 of gate and 64 of up in a threadgroup
  EXPECT_EQ(base.gate_up_bytes, packed_tile_bytes(64, 8, 64, true));
  EXPECT_EQ(base.gate_up_code_flags, CODE_SHORT_ROWS);
  EXPECT_EQ(base.down_code_flags, 0u) << "its product is not packed";
  EXPECT_EQ(base.down_blocks, 2048u / BASE_TILE_N);
  EXPECT_LT(base.down_bytes, base.gate_up_bytes);
  const ExpertsPlan decode = plan(Family::Decode, 113 << 10);
  EXPECT_EQ(decode.gate_up_blocks, 97u) << "16 columns of 1540: with 48 there are more threadgroups than cores";
  EXPECT_EQ(decode.gate_up_simdgroups, 4u);
  EXPECT_EQ(decode.gate_up_bytes, packed_gate_up(64, 2, false).bytes);
  EXPECT_EQ(decode.gate_up_code_flags, 0u);
  shape.packed_down_group = 32;
  EXPECT_EQ(plan(Family::LargeBatch, 100 << 10).down_blocks, 2048u / 128);
  EXPECT_EQ(plan(Family::LargeBatch, 100 << 10).down_bytes, packed_tile_bytes(64, 16, 32, true));
  EXPECT_EQ(plan(Family::Decode, 100 << 10).down_bytes, packed_down_bytes(12, 16, 32));
  EXPECT_EQ(plan(Family::Decode, 100 << 10).down_simdgroups, 12u);
  EXPECT_EQ(plan(Family::Decode, 100 << 10).down_code_flags, CODE_SHORT_ROWS);
  EXPECT_EQ(plan(Family::Decode, 48 << 10).down_bytes, packed_down_bytes(8, 16, 32)) << "fewer simdgroups fit";
  EXPECT_EQ(plan(Family::Decode, 48 << 10).down_simdgroups, 8u);
  shape.intermediate = 4096; // long rows of down
  EXPECT_EQ(plan(Family::Decode, 113 << 10).down_blocks, 2048u / 32);
  EXPECT_EQ(plan(Family::Decode, 113 << 10).down_bytes, packed_down_bytes(16, 32, 32));
  EXPECT_EQ(plan(Family::Decode, 80 << 10).down_blocks, 2048u / 16) << "more weight rows do not fit";
  shape.intermediate = 1536;
  shape.packed_gate_up_group = 64;
  shape.hidden = 4096; // long rows of gate and up
  EXPECT_EQ(plan(Family::LargeBatch, 150 << 10).gate_up_blocks, 25u) << "1540 columns, 64 of gate and 64 of up again";
  EXPECT_EQ(plan(Family::LargeBatch, 150 << 10).gate_up_code_flags, 0u);
  EXPECT_EQ(plan(Family::LargeBatch, 100 << 10).gate_up_blocks, 49u) << "128 rows of a simdgroup do not fit";
  EXPECT_EQ(plan(Family::Base, 100 << 10).gate_up_blocks, 49u);
  shape.hidden = 2048;
  shape.tokens = PACKED_SHORT_ASSIGNMENTS / 5; // 5 slots
  EXPECT_EQ(plan(Family::Base, 100 << 10).down_code_flags, CODE_SHORT_ROWS);
  EXPECT_LE(plan(Family::Base, 100 << 10).tiles, 65535u) << "in one launch of CUDA's";
  ++shape.tokens;
  EXPECT_EQ(plan(Family::Base, 100 << 10).down_code_flags, 0u) << "tiles stand in its first dimension";
  shape.tokens = 128;
  EXPECT_EQ(plan(Family::LargeBatch, 48 << 10).down_blocks, 2048u / LARGE_BATCH_TILE_N) << "they do not fit";
  EXPECT_LE(plan(Family::LargeBatch, 48 << 10).down_bytes, 48u << 10);
  shape.tokens = 1;
  shape.shared = shape.shared_intermediate = 0;
  const ExpertsPlan whole = plan(Family::Decode, 113 << 10);
  EXPECT_EQ(whole.gate_up_blocks, 32u) << "with 4 slots 128 threadgroups, no more than cores";
  EXPECT_EQ(whole.gate_up_simdgroups, 8u);
  EXPECT_EQ(whole.gate_up_bytes, packed_gate_up(64, 2, true).bytes);
  EXPECT_EQ(whole.gate_up_code_flags, CODE_SHORT_ROWS);
  EXPECT_EQ(plan(Family::Decode, 97 << 10).gate_up_blocks, 96u) << "whole rows and `down` do not fit together";
}

TEST(Plan, RowTilesComeFromTheIdsWhereEachAssignmentHasALane) {
  const auto from_ids = [](const Tuning& tuning, Family family, uint32_t tokens, uint32_t experts) {
    LayerShape shape = glm(); // 5 assignments per token
    shape.tokens = tokens;
    shape.experts = experts;
    return plan_experts(tuning, family, shape, true).tiles_from_ids;
  };
  for (Family family : {Family::Prefill4, Family::Base, Family::LargeBatch, Family::Simd}) {
    EXPECT_TRUE(from_ids({}, family, 6, 64));
    EXPECT_FALSE(from_ids({}, family, 7, 64));
    EXPECT_FALSE(from_ids(tuning_for("native"), family, 6, 64));
  }
  EXPECT_FALSE(from_ids({}, Family::Decode, 6, 64));
  EXPECT_FALSE(from_ids({}, Family::LargeBatch, 6, 1)) << "row tiles of 32";
}

TEST(Plan, TrellisWeightsHaveLargeRowTilesWhereExpertsHaveManyRows) {
  LayerShape shape = glm();
  shape.shared = shape.shared_intermediate = 0;
  shape.trellis = shape.trellis_alone = true;
  const Tuning& cuda = tuning_for("cuda");
  const auto row_tile = [&](const Tuning& tuning, Family family, uint32_t mean_rows) {
    shape.tokens = mean_rows * shape.experts / shape.top_k;
    return plan_experts(tuning, family, shape, true).row_tile;
  };
  EXPECT_EQ(row_tile(cuda, Family::LargeBatch, cuda.trellis_many_rows), TRELLIS_PRODUCT_MOST_ROWS);
  EXPECT_EQ(row_tile(cuda, Family::LargeBatch, cuda.trellis_many_rows - 1), 16u);
  EXPECT_EQ(row_tile(cuda, Family::Base, 1000), BASE_ROW_TILE);
  EXPECT_EQ(row_tile({}, Family::LargeBatch, 1000), 16u) << "without matrix instructions";
  shape.trellis_alone = false;
  EXPECT_EQ(row_tile(cuda, Family::LargeBatch, 1000), 16u) << "the other product's kernels share the tiles";
}

TEST(Trellis, SlicesFillTheCoresOfALargeGpu) {
  EXPECT_EQ(trellis_slices(112, 10000, 112), 1u) << "threadgroups enough";
  EXPECT_EQ(trellis_slices(112, 1u << 31, 112), 1u) << "more than enough";
  EXPECT_EQ(trellis_slices(1, 1, 1), 1u) << "nothing to divide";
  EXPECT_EQ(trellis_slices(112, 256, 112), 2u) << "512 threadgroups of 56 blocks";
  EXPECT_GE(trellis_slices(112, 10000, 16), 7u) << "no more than 16 blocks each";
  for (uint32_t blocks : {1u, 5u, 16u, 112u})
    for (uint32_t slices = 1; slices <= std::min(blocks, TRELLIS_SLICES); ++slices) {
      EXPECT_EQ(trellis_slice(0, blocks, slices), 0u);
      EXPECT_EQ(trellis_slice(slices, blocks, slices), blocks);
      for (uint32_t s = 0; s < slices; ++s)
        EXPECT_GT(trellis_slice(s + 1, blocks, slices), trellis_slice(s, blocks, slices)) << "none is empty";
    }
}

TEST(Plan, RefusesMoreThanTheGroupingKernelTakes) {
  LayerShape shape = glm();
  shape.tokens = GROUP_MAX_ASSIGNMENTS / 5 + 1;
  EXPECT_THROW(plan_experts({}, Family::LargeBatch, shape, true), std::invalid_argument);
  EXPECT_NO_THROW(plan_experts({}, Family::Decode, shape, true));
  shape = glm();
  shape.experts = GROUP_MAX_EXPERTS;
  EXPECT_THROW(plan_experts({}, Family::Base, shape, true), std::invalid_argument);
  shape.shared = 0;
  EXPECT_NO_THROW(plan_experts({}, Family::Base, shape, true));
}

} // namespace
} // namespace metal_moe::testing
