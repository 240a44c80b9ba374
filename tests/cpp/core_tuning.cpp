// Measured tuning: which entry of a table holds for a layer, and that an engine takes a new table at any time.
#include "core_support.h"

#include <atomic>
#include <cmath>
#include <thread>

namespace metal_moe::testing {
namespace {

TuningTable::Entry entry(uint32_t hidden, uint32_t decode_tokens, Dtype dtype = Dtype::Bf16, bool quantized = false,
                         float bits = 16) {
  TuningTable::Entry made;
  made.layer = {hidden, hidden ? 768u : 0, hidden ? 128u : 0, hidden ? 8u : 0, dtype, quantized, bits};
  made.tuning.decode_tokens = decode_tokens;
  return made;
}

TunedLayer layer(uint32_t hidden, Dtype dtype = Dtype::Bf16, bool quantized = false, float bits = 16) {
  return entry(hidden, 1, dtype, quantized, bits).layer;
}

TEST(TuningTable, TheLayersOwnShapeComesFirst) {
  const TuningTable table({entry(0, 2), entry(2048, 3), entry(4096, 4), entry(0, 5, Dtype::Fp32, false, 32)});
  EXPECT_EQ(table.find(layer(2048))->decode_tokens, 3u);
  EXPECT_EQ(table.find(layer(4096))->decode_tokens, 4u);
  EXPECT_EQ(table.find(layer(1024))->decode_tokens, 2u);
  EXPECT_EQ(table.find(layer(2048, Dtype::Fp32, false, 32))->decode_tokens, 5u);
  EXPECT_EQ(table.find(layer(2048, Dtype::Fp16)), nullptr);
  EXPECT_EQ(table.find(layer(2048, Dtype::Bf16, true, 4)), nullptr) << "dense weights say nothing of quantised ones";
  EXPECT_EQ(TuningTable().find(layer(2048)), nullptr);
}

TEST(TuningTable, TheNearestBitsThenTheFirst) {
  const TuningTable table({entry(0, 2, Dtype::Bf16, true, 4.5f), entry(0, 3, Dtype::Bf16, true, 8.5f),
                           entry(0, 4, Dtype::Bf16, true, 8.5f), entry(2048, 5, Dtype::Bf16, true, 8.25f)});
  EXPECT_EQ(table.find(layer(64, Dtype::Bf16, true, 3))->decode_tokens, 2u);
  EXPECT_EQ(table.find(layer(64, Dtype::Bf16, true, 6.5f))->decode_tokens, 2u) << "as near: the first";
  EXPECT_EQ(table.find(layer(64, Dtype::Bf16, true, 8))->decode_tokens, 3u);
  EXPECT_EQ(table.find(layer(2048, Dtype::Bf16, true, 2))->decode_tokens, 5u) << "shape before bits";
}

TEST(TuningTable, TrellisCodesApart) {
  TuningTable::Entry trellis = entry(0, 2, Dtype::Bf16, true, 4);
  trellis.layer.trellis = true;
  const TuningTable table({trellis, entry(2048, 3, Dtype::Bf16, true, 8.5f)});
  TunedLayer asked = layer(2048, Dtype::Bf16, true, 4);
  EXPECT_EQ(table.find(asked)->decode_tokens, 3u);
  asked.trellis = true;
  EXPECT_EQ(table.find(asked)->decode_tokens, 2u);
}

TEST(TuningTable, ByBitsAlone) {
  const TuningTable table({entry(2048, 9), entry(0, 2), entry(0, 3, Dtype::Fp16, true, 4)});
  EXPECT_EQ(table.find(layer_of_bits({}, 16, {}))->decode_tokens, 2u) << "every shape, any dtype";
  EXPECT_EQ(table.find(layer_of_bits(4, 4, 3))->decode_tokens, 3u);
}

TEST(TuningTable, RefusesWhatMakesNoSense) {
  const auto message = [](auto change) {
    TuningTable::Entry made = entry(0, 1);
    change(made.tuning);
    try {
      TuningTable({made});
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("no exception");
  };
  EXPECT_NE(message([](Tuning& t) { t.decode_tokens = 0; }).find("decode_tokens is 0"), std::string::npos);
  EXPECT_NE(message([](Tuning& t) { t.decode_tokens = 17; }).find("decode_tokens is 17"), std::string::npos);
  EXPECT_NE(message([](Tuning& t) { t.base_tokens = 3; }).find("prefill4_tokens is 16"), std::string::npos);
  EXPECT_NE(message([](Tuning& t) { t.largest_row_tile = 0; }).find("largest_row_tile is 0"), std::string::npos);
  EXPECT_NE(message([](Tuning& t) { t.row_tile_per_mean_rows = -1; }).find("row_tile_per_mean_rows is -1"),
            std::string::npos);
  EXPECT_NE(message([](Tuning& t) { t.row_tile_per_mean_rows = NAN; }).find("row_tile_per_mean_rows is nan"),
            std::string::npos);
}

TEST(TuningTable, SelectionFollowsIt) {
  Tuning tuning;
  tuning.decode_tokens = 3;
  tuning.prefill4_tokens = tuning.base_tokens = 5;
  EXPECT_EQ(select_moe_kernel(3, true, {}, {}, {}, tuning).name, "moe_decode_fp32acc");
  EXPECT_EQ(select_moe_kernel(5, true, {}, {}, {}, tuning).name, "moe_prefill4_fp32acc");
  EXPECT_EQ(select_moe_kernel(6, true, {}, {}, {}, tuning).name, "moe_large_batch_fp32acc");
}

TEST(TuningTable, BitsOfALayer) {
  LayerShape shape;
  shape.hidden = 64;
  shape.intermediate = 32;
  shape.dtype = Dtype::Bf16;
  EXPECT_EQ(tuned_layer(shape).weight_bits, 16.0f);
  EXPECT_FALSE(tuned_layer(shape).quantized);
  shape.quantized_gate_up_bytes = 2 * 64 * 32 / 2; // 4 bits
  EXPECT_FLOAT_EQ(tuned_layer(shape).weight_bits, (2 * 4 + 16) / 3.0f);
  shape.quantized_down_bytes = 64 * 32; // 8 bits
  EXPECT_FLOAT_EQ(tuned_layer(shape).weight_bits, (2 * 4 + 8) / 3.0f);
  EXPECT_TRUE(tuned_layer(shape).quantized);
}

TEST(MoeEngine, TakesANewTableWhileOthersRead) {
  MoeEngine& on = engine("native");
  const uint32_t usual = on.tuning().decode_tokens;
  EXPECT_EQ(on.measured(layer(2048)), nullptr);
  EXPECT_EQ(on.tuning(layer(2048)).decode_tokens, usual);
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  std::atomic<uint32_t> wrong{0};
  for (int i = 0; i < 3; ++i)
    readers.emplace_back([&] {
      while (!done.load()) {
        const uint32_t tokens = on.tuning(layer(2048)).decode_tokens;
        wrong += tokens != usual && (tokens < 2 || tokens > 4);
      }
    });
  for (uint32_t round = 0; round < 300; ++round) {
    const uint32_t tokens = 2 + round % 3;
    on.set_tuning_table(TuningTable({entry(2048, tokens)}));
    ASSERT_EQ(on.tuning(layer(2048)).decode_tokens, tokens);
    ASSERT_EQ(on.tuning(layer(4096)).decode_tokens, usual);
  }
  done = true;
  for (std::thread& reader : readers)
    reader.join();
  EXPECT_EQ(wrong, 0u);
  on.set_tuning_table({});
  EXPECT_EQ(on.measured(layer(2048)), nullptr);
}

TEST(MoeEngine, ANewOneIsAnnouncedOnce) {
  // Engines stay: one that no other test makes, in whatever order tests share a process.
  static constexpr const char* name = "null";
  const bool known = MoeEngine::find(name) != nullptr; // from an earlier round of this test
  static std::atomic<int> announced;
  announced = 0;
  MoeEngine::set_library_path(METAL_MOE_TEST_LIBRARY);
  MoeEngine::on_new([](std::string_view made_name, MoeEngine& made) {
    EXPECT_EQ(made_name, name);
    EXPECT_EQ(&made, &MoeEngine::get(name)) << "the handler may use it";
    ++announced;
  });
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([] { MoeEngine::get(name); });
  for (std::thread& caller : callers)
    caller.join();
  EXPECT_EQ(announced, known ? 0 : 1);
  MoeEngine::on_new({});
}

} // namespace
} // namespace metal_moe::testing
