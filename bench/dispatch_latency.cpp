// What a call costs beside its arithmetic: encode, commit and wait of the smallest operations.
//
//   route/T     one dispatch, T tokens, 64 experts, 4 per token
//   layer/T     a whole layer, H = I = 64, 4 experts, 2 per token: three dispatches at T = 1, five beyond
//
// The arithmetic of these is below a microsecond per token; the rest is the price of a command buffer. Each layer is
// checked against a float64 loop first, and a family other than the one selected for T is an error.
#include "support.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using namespace metal_moe;

using bench::random_values;

MoeEngine& engine() { return bench::engine("native"); }

void route(benchmark::State& state) {
  const int64_t tokens = state.range(0), experts = 64;
  constexpr uint32_t top_k = 4;
  const std::vector<float> logits = random_values(tokens * experts, 1, 1);
  const TensorView logits_view = bench::tensor(engine().context(), logits, {tokens, experts});
  std::vector<float> weights(tokens * top_k);
  std::vector<int32_t> ids(tokens * top_k);
  const auto weights_buffer = engine().context().wrap(weights.data(), weights.size() * sizeof(float));
  const auto ids_buffer = engine().context().wrap(ids.data(), ids.size() * sizeof(int32_t));
  for (auto _ : state)
    run_operation(engine(), "fused_topk", [&](CommandStream& stream) {
      encode_route(stream, engine(), logits_view, {}, top_k, {}, {weights_buffer.get()}, {ids_buffer.get()});
    });
  const float* row = logits.data();
  if (ids[0] != std::max_element(row, row + experts) - row)
    state.SkipWithError("the first expert of token 0 is not the one with the largest logit");
}

/// A layer whose result can be compared with a float64 loop.
struct Layer : bench::Layer {
  explicit Layer(int64_t tokens) : bench::Layer(bench::engine("native"), tokens) {}

  /// Largest error of a token, relative to the norm of its row.
  double error() const {
    double worst = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> row(HIDDEN);
      const float* scores = &logits[t * EXPERTS];
      std::vector<int64_t> order{0, 1, 2, 3};
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
      double total = 0;
      for (int64_t slot = 0; slot < TOP_K; ++slot)
        total += std::exp(double(scores[order[slot]]));
      for (int64_t slot = 0; slot < TOP_K; ++slot)
        add_expert(row, t, order[slot], std::exp(double(scores[order[slot]])) / total);
      double difference = 0, norm = 0;
      for (int64_t i = 0; i < HIDDEN; ++i) {
        difference += (row[i] - out[t * HIDDEN + i]) * (row[i] - out[t * HIDDEN + i]);
        norm += row[i] * row[i];
      }
      worst = std::max(worst, std::sqrt(difference / norm));
    }
    return worst;
  }

private:
  static double dot(const float* row, const auto* vector, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
      sum += double(row[i]) * vector[i];
    return sum;
  }

  void add_expert(std::vector<double>& row, int64_t token, int64_t expert, double weight) const {
    std::vector<double> h(INTERMEDIATE);
    for (int64_t i = 0; i < INTERMEDIATE; ++i) {
      const float* gate_row = &w1[(expert * 2 * INTERMEDIATE + i) * HIDDEN];
      const double gate = dot(gate_row, &x[token * HIDDEN], HIDDEN);
      const double up = dot(gate_row + INTERMEDIATE * HIDDEN, &x[token * HIDDEN], HIDDEN);
      h[i] = gate / (1 + std::exp(-gate)) * up;
    }
    for (int64_t i = 0; i < HIDDEN; ++i)
      row[i] += weight * dot(&w2[(expert * HIDDEN + i) * INTERMEDIATE], h.data(), INTERMEDIATE);
  }
};

void layer(benchmark::State& state) {
  Layer layer(state.range(0));
  layer.run();
  const auto tokens = static_cast<uint32_t>(layer.tokens);
  const Family family = select_family(engine().tuning(), tokens, tokens * bench::Layer::TOP_K);
  const char* expected = family_name(family, layer.experts.fp32_accumulation);
  if (std::strcmp(last_dispatch().family, expected) != 0)
    return state.SkipWithError(last_dispatch().family);
  if (!(layer.error() < 1e-5))
    return state.SkipWithError("the output is not the float64 loop's");
  for (auto _ : state)
    layer.run();
}

BENCHMARK(route)->Arg(1)->Arg(128)->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(layer)->Arg(1)->Arg(4)->Arg(32)->Arg(128)->UseRealTime()->Unit(benchmark::kMicrosecond);

} // namespace

BENCHMARK_MAIN();
