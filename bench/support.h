// What the C++ benchmarks share: engines on the compiled library, and tensors in vectors.
#pragma once

#include "moe/fused_moe.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

namespace metal_moe::bench {

inline MoeEngine& engine(const char* name) {
  MoeEngine::set_library_path(METAL_MOE_BENCH_LIBRARY);
  return MoeEngine::get(name);
}

inline std::vector<float> random_values(size_t count, float scale, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values)
    value = normal(generator);
  return values;
}

/// The values as a contiguous fp32 tensor, in place.
inline TensorView tensor(Context& context, const std::vector<float>& values, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.buffer = context.wrap(values.data(), values.size() * sizeof(float));
  view.address = reinterpret_cast<uintptr_t>(values.data());
  view.dtype = Dtype::Fp32;
  view.item_size = sizeof(float);
  view.rank = static_cast<uint32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  int64_t stride = 1;
  for (uint32_t i = view.rank; i-- > 0; stride *= view.shape[i])
    view.strides[i] = stride;
  return view;
}

/// An operation's layer with its tensors: 4 experts, 2 per token, H = I = 64, softmax routing, renormalised, silu.
struct Layer {
  static constexpr int64_t HIDDEN = 64, INTERMEDIATE = 64, EXPERTS = 4, TOP_K = 2;

  Layer(MoeEngine& engine, int64_t tokens)
      : engine(engine), tokens(tokens), x(random_values(tokens * HIDDEN, 1, 1)),
        logits(random_values(tokens * EXPERTS, 1, 2)),
        w1(random_values(EXPERTS * 2 * INTERMEDIATE * HIDDEN, 0.125f, 3)),
        w2(random_values(EXPERTS * HIDDEN * INTERMEDIATE, 0.125f, 4)), out(tokens * HIDDEN) {
    Context& context = engine.context();
    experts.w1 = tensor(context, w1, {EXPERTS, 2 * INTERMEDIATE, HIDDEN});
    experts.w2 = tensor(context, w2, {EXPERTS, HIDDEN, INTERMEDIATE});
    x_view = tensor(context, x, {tokens, HIDDEN});
    logits_view = tensor(context, logits, {tokens, EXPERTS});
    out_view = tensor(context, out, {tokens, HIDDEN});
  }

  void encode(CommandStream& stream) {
    encode_fused_moe(stream, engine, x_view, experts, logits_view, {}, TOP_K, {}, out_view);
  }
  void run() {
    run_operation(engine, "fused_moe", [&](CommandStream& stream) { encode(stream); });
  }

  MoeEngine& engine;
  const int64_t tokens;
  const std::vector<float> x, logits, w1, w2;
  std::vector<float> out;
  ExpertsLayer experts;
  TensorView x_view, logits_view, out_view;
};

} // namespace metal_moe::bench
