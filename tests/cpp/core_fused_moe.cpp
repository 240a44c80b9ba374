// The operations end to end in C++: numbers against a double reference, and what was dispatched for them.
#include "core_support.h"

#include <cmath>
#include <random>
#include <thread>

namespace metal_moe::testing {
namespace {

/// A gated silu layer with fp32 weights, and its result in double.
struct Layer {
  uint32_t T, H, I, E, k, N; // N shared experts of the same I
  std::vector<float> x, w1, w2, shared_w1, shared_w2, weights, logits;
  std::vector<int32_t> ids;

  Layer(uint32_t T, uint32_t H, uint32_t I, uint32_t E, uint32_t k, uint32_t N) : T(T), H(H), I(I), E(E), k(k), N(N) {
    std::mt19937 random(T * 31 + H);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& values, size_t size, float scale) {
      values.resize(size);
      for (float& value : values)
        value = normal(random) * scale;
    };
    fill(x, size_t(T) * H, 1);
    fill(w1, size_t(E) * 2 * I * H, 1 / std::sqrt(float(H)));
    fill(w2, size_t(E) * H * I, 1 / std::sqrt(float(I)));
    fill(shared_w1, size_t(N) * 2 * I * H, 1 / std::sqrt(float(H)));
    fill(shared_w2, size_t(N) * H * I, 1 / std::sqrt(float(I)));
    fill(logits, size_t(T) * E, 1);
    // Softmax routing, renormalised: what encode_route must find.
    for (uint32_t t = 0; t < T; ++t) {
      std::vector<int32_t> order(E);
      std::iota(order.begin(), order.end(), 0);
      const float* row = &logits[size_t(t) * E];
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
      double sum = 0;
      for (uint32_t s = 0; s < k; ++s)
        sum += std::exp(double(row[order[s]]));
      for (uint32_t s = 0; s < k; ++s) {
        ids.push_back(order[s]);
        weights.push_back(float(std::exp(double(row[order[s]])) / sum));
      }
    }
  }

  void add_expert(const float* w1, const float* w2, const float* row, double weight, double* out) const {
    std::vector<double> h(I);
    for (uint32_t i = 0; i < I; ++i) {
      double gate = 0, up = 0;
      for (uint32_t j = 0; j < H; ++j) {
        gate += double(w1[size_t(i) * H + j]) * row[j];
        up += double(w1[size_t(I + i) * H + j]) * row[j];
      }
      h[i] = gate / (1 + std::exp(-gate)) * up;
    }
    for (uint32_t j = 0; j < H; ++j)
      for (uint32_t i = 0; i < I; ++i)
        out[j] += weight * double(w2[size_t(j) * I + i]) * h[i];
  }

  /// Largest error of a row relative to its norm.
  double error(const std::vector<float>& got) const {
    double worst = 0;
    for (uint32_t t = 0; t < T; ++t) {
      std::vector<double> want(H);
      for (uint32_t s = 0; s < k; ++s) {
        const size_t e = size_t(ids[t * k + s]);
        add_expert(&w1[e * 2 * I * H], &w2[e * H * I], &x[size_t(t) * H], weights[t * k + s], want.data());
      }
      for (size_t n = 0; n < N; ++n)
        add_expert(&shared_w1[n * 2 * I * H], &shared_w2[n * H * I], &x[size_t(t) * H], 1, want.data());
      double norm = 0, distance = 0;
      for (uint32_t j = 0; j < H; ++j) {
        norm += want[j] * want[j];
        const double d = double(got[size_t(t) * H + j]) - want[j];
        distance += d * d;
      }
      const double relative = std::sqrt(distance / norm);
      worst = relative > worst || std::isnan(relative) ? relative : worst;
    }
    return worst;
  }

  ExpertsLayer views(Context& context) const {
    ExpertsLayer layer;
    layer.w1 = tensor(context, w1, {E, 2 * int64_t(I), H});
    layer.w2 = tensor(context, w2, {E, H, I});
    if (N > 0) {
      layer.shared_w1 = tensor(context, shared_w1, {N, 2 * int64_t(I), H});
      layer.shared_w2 = tensor(context, shared_w2, {N, H, I});
    }
    return layer;
  }

  std::vector<float> run_experts(MoeEngine& on, std::optional<std::string_view> family) const {
    Context& context = on.context();
    std::vector<float> out(x.size(), NAN);
    ExpertsLayer layer = views(context);
    layer.family = family;
    const TensorView x_view = tensor(context, x, {T, H}), out_view = tensor(context, out, {T, H});
    const TensorView ids_tensor = tensor(context, ids, {T, k}), weights_tensor = tensor(context, weights, {T, k});
    run_operation(on, "fused_experts", [&](CommandStream& stream) {
      encode_experts(stream, on, x_view, layer, ids_view(ids_tensor), weights_view(weights_tensor), k, out_view);
    });
    return out;
  }

  std::vector<float> run_moe(MoeEngine& on, std::optional<std::string_view> family = {}) const {
    Context& context = on.context();
    std::vector<float> out(x.size(), NAN);
    ExpertsLayer layer = views(context);
    layer.family = family;
    const TensorView x_view = tensor(context, x, {T, H}), out_view = tensor(context, out, {T, H});
    const TensorView logits_view = tensor(context, logits, {T, E});
    run_operation(on, "fused_moe", [&](CommandStream& stream) {
      encode_fused_moe(stream, on, x_view, layer, logits_view, {}, k, {}, out_view);
    });
    return out;
  }
};

std::vector<std::string> kernels_run() {
  const DispatchTrace& trace = last_dispatch();
  return {trace.kernels.begin(), trace.kernels.begin() + trace.dispatches};
}

class FusedMoe : public ::testing::TestWithParam<const char*> {
protected:
  MoeEngine& on = engine(GetParam());
};
INSTANTIATE_TEST_SUITE_P(Engines, FusedMoe, ::testing::Values("native", "exact"),
                         [](const auto& info) { return info.param; });

TEST_P(FusedMoe, EveryFamilyComputesTheLayer) {
  const Layer layer(5, 72, 40, 6, 2, 1);
  for (const char* family : {"moe_decode", "moe_prefill4", "moe_base", "moe_large_batch", "moe_simd"}) {
    EXPECT_LE(layer.error(layer.run_experts(on, family)), 1e-5) << family;
    EXPECT_EQ(last_dispatch().family, std::string(family) + "_fp32acc");
    // 15 assignments: a GPU's threadgroups find their row tiles in the ids.
    EXPECT_EQ(last_dispatch().dispatches, std::string(family) == "moe_decode"   ? 2u
                                          : std::string(GetParam()) == "native" ? 4u
                                                                                : 3u);
    EXPECT_EQ(last_dispatch().commits, 1u);
    EXPECT_TRUE(last_dispatch().vectorized);
  }
}

TEST_P(FusedMoe, DecodeIsThreeDispatchesOfOneCommandBuffer) {
  const Layer layer(1, 64, 64, 8, 2, 1);
  EXPECT_LE(layer.error(layer.run_moe(on)), 1e-5);
  EXPECT_EQ(kernels_run(),
            (std::vector<std::string>{"route", "gate_up_decode_fp32acc_fp32", "down_decode_fp32acc_fp32"}));
  EXPECT_EQ(last_dispatch().commits, 1u);
}

TEST_P(FusedMoe, PrefillIsFiveDispatchesOfOneCommandBuffer) {
  const Layer layer(40, 33, 17, 4, 3, 0);
  EXPECT_LE(layer.error(layer.run_moe(on, "moe_large_batch")), 1e-5);
  EXPECT_EQ(kernels_run(), (std::vector<std::string>{"route", "group", "gate_up_large_batch_fp32acc_m32_fp32",
                                                     "down_large_batch_fp32acc_m32_fp32", "combine_fp32"}));
  EXPECT_EQ(last_dispatch().commits, 1u);
  EXPECT_EQ(last_dispatch().row_tile, 32u);
  EXPECT_EQ(last_dispatch().tile_n, 128u);
  EXPECT_FALSE(last_dispatch().vectorized);
}

TEST_P(FusedMoe, PackingServesEveryLayerOfItsShape) {
  Context& context = on.context();
  for (const char* family : {"moe_decode", "moe_base"}) {
    ExpertsPacking packing{};
    for (uint32_t round = 0; round < 3; ++round) {
      Layer layer(3, 64, 40, 6, 2, 1);
      std::mt19937 random(round); // other tensors, in other places, one of them where vectors do not fit
      std::shuffle(layer.x.begin(), layer.x.end(), random);
      std::shuffle(layer.w1.begin(), layer.w1.end(), random);
      std::vector<float> moved(layer.x.size() + 1), out(layer.x.size(), NAN);
      std::copy(layer.x.begin(), layer.x.end(), moved.begin() + 1);
      ExpertsLayer views = layer.views(context);
      views.family = family;
      TensorView x = tensor(context, layer.x, {3, 64});
      if (round == 1) {
        x.buffer = context.wrap(moved.data() + 1, layer.x.size() * sizeof(float));
        x.address = reinterpret_cast<uintptr_t>(moved.data() + 1);
      }
      const TensorView out_view = tensor(context, out, {3, 64});
      const TensorView ids = tensor(context, layer.ids, {3, 2}), weights = tensor(context, layer.weights, {3, 2});
      if (round == 0)
        packing = pack_experts(on, x, views, ids_view(ids), weights_view(weights), 2);
      run_operation(on, "fused_experts", [&](CommandStream& stream) {
        encode_experts(stream, on, packing, x, views, ids_view(ids), weights_view(weights), out_view);
      });
      EXPECT_LE(layer.error(out), 1e-5) << family << " " << round;
      EXPECT_EQ(last_dispatch().family, std::string(family) + "_fp32acc");
      EXPECT_EQ(last_dispatch().vectorized, round != 1);
    }
  }
}

TEST_P(FusedMoe, FewAssignmentsDoWithoutGroup) {
  std::vector<std::string> kernels = {"route", "gate_up_prefill4_fp32acc_fp32", "down_prefill4_fp32acc_fp32",
                                      "combine_fp32"};
  if (std::string(GetParam()) == "native") // one lane, one assignment
    kernels.insert(kernels.begin() + 1, "group");
  const Layer most(8, 33, 17, 5, 3, 1); // 32 with those of the shared expert
  EXPECT_LE(most.error(most.run_moe(on)), 1e-5);
  EXPECT_EQ(kernels_run(), kernels);
  const Layer more(11, 33, 17, 5, 3, 0);
  EXPECT_LE(more.error(more.run_moe(on)), 1e-5);
  EXPECT_EQ(kernels_run()[1], "group");
}

TEST_P(FusedMoe, NoTokensNoDispatch) {
  const Layer layer(0, 64, 64, 8, 2, 1);
  EXPECT_TRUE(layer.run_moe(on).empty());
  EXPECT_TRUE(layer.run_experts(on, {}).empty());
  EXPECT_EQ(last_dispatch().dispatches, 0u);
  EXPECT_EQ(last_dispatch().commits, 0u);
}

TEST_P(FusedMoe, SimdRefusesUnalignedShapesByName) {
  const auto message = [&](const Layer& layer) -> std::string {
    try {
      layer.run_experts(on, "moe_simd");
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "no exception";
  };
  EXPECT_EQ(message(Layer(2, 65, 64, 2, 1, 0)),
            "kernel is 'moe_simd', but hidden_states has H = 65, not a multiple of 8");
  EXPECT_EQ(message(Layer(2, 64, 63, 2, 1, 0)), "kernel is 'moe_simd', but w2 has I = 63, not a multiple of 8");
}

TEST_P(FusedMoe, ScratchIsReusedFromCallToCall) {
  const Layer layer(20, 64, 64, 8, 2, 0);
  layer.run_moe(on);
  const auto before = on.context().pool().statistics();
  for (int i = 0; i < 5; ++i)
    layer.run_moe(on);
  const auto after = on.context().pool().statistics();
  EXPECT_EQ(after.misses, before.misses);
  EXPECT_EQ(after.bytes_in_use, 0u);
}

TEST_P(FusedMoe, ManyThreadsGetTheirOwnResults) {
  const Layer small(1, 64, 40, 8, 2, 1), large(40, 40, 64, 4, 2, 0);
  const auto expected_small = small.run_moe(on), expected_large = large.run_moe(on);
  ASSERT_LE(small.error(expected_small), 1e-5);
  ASSERT_LE(large.error(expected_large), 1e-5);
  const int calls = std::string(GetParam()) == "exact" ? 3 : 100;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < calls; ++i) {
        const bool one = (t + i) % 2 == 0;
        // Bitwise: results do not depend on what else runs.
        if ((one ? small : large).run_moe(on) != (one ? expected_small : expected_large) ||
            last_dispatch().dispatches != (one ? 3u : 5u))
          ++wrong;
      }
    });
  for (auto& thread : threads)
    thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_P(FusedMoe, GroupingSortsByExpert) {
  Context& context = on.context();
  const std::vector<int32_t> ids = {2, 0, 7, 2, -1, 0}; // 7 and -1 are no experts
  std::vector<int32_t> offsets(4, -9), sorted(6, -9), inverse(6, -9), tiles(5 * 4, -9), padded(3 * 2, -9);
  const TensorView ids_tensor = tensor(context, ids, {3, 2});
  const TensorView offsets_view = tensor(context, offsets, {4}), sorted_view = tensor(context, sorted, {6});
  const TensorView inverse_view = tensor(context, inverse, {6}), tiles_view = tensor(context, tiles, {5, 4});
  const TensorView padded_view = tensor(context, padded, {3, 2});
  run_operation(on, "group_tokens", [&](CommandStream& stream) {
    encode_group(stream, on, ids_view(ids_tensor), 3, 2, 3, 0, 2,
                 {offsets_view.view(), sorted_view.view(), inverse_view.view(), tiles_view.view(), 5});
    encode_pad_groups(stream, on, offsets_view.view(), sorted_view.view(), 3, 2, padded_view.view());
  });
  EXPECT_EQ(offsets, (std::vector<int32_t>{0, 2, 2, 4}));
  EXPECT_EQ(sorted, (std::vector<int32_t>{1, 5, 0, 3, -1, -1}));
  EXPECT_EQ(inverse, (std::vector<int32_t>{2, 0, -1, 3, -1, 1}));
  EXPECT_EQ(tiles, (std::vector<int32_t>{0, 0, 2, 0, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(padded, (std::vector<int32_t>{1, 5, -1, -1, 0, 3}));
}

TEST_P(FusedMoe, GroupingWithoutTokensStillWritesOffsets) {
  Context& context = on.context();
  std::vector<int32_t> offsets(4, -9);
  const TensorView offsets_view = tensor(context, offsets, {4});
  run_operation(on, "group_tokens", [&](CommandStream& stream) {
    encode_group(stream, on, {{}, 2, 1, 1}, 0, 2, 3, 0, 16, {offsets_view.view(), {}, {}, {}, 0});
  });
  EXPECT_EQ(offsets, (std::vector<int32_t>{0, 0, 0, 0}));
}

TEST_P(FusedMoe, GatherCopiesSelectedExperts) {
  Context& context = on.context();
  std::vector<float> weights(4 * 6);
  std::iota(weights.begin(), weights.end(), 0.0f);
  const std::vector<int32_t> ids = {3, 9, 0};
  std::vector<float> out(3 * 6, NAN);
  const TensorView weights_view = tensor(context, weights, {4, 2, 3}), ids_tensor = tensor(context, ids, {3});
  const TensorView out_view = tensor(context, out, {3, 2, 3});
  run_operation(on, "gather_experts",
                [&](CommandStream& stream) { encode_gather(stream, on, weights_view, ids_tensor, out_view); });
  std::vector<float> expected(3 * 6, 0.0f);
  std::copy_n(weights.begin() + 18, 6, expected.begin());
  std::copy_n(weights.begin(), 6, expected.begin() + 12);
  EXPECT_EQ(out, expected);
}

} // namespace
} // namespace metal_moe::testing
