// Encodes `route`: router logits to the ids and weights of each token's experts.
#pragma once

#include "engine.h"

namespace metal_moe {

/// What decides the choice of experts; meanings in kernels/moe/route.h.
struct RoutingOptions {
  RouteScoring scoring = ROUTE_SOFTMAX;
  uint32_t groups = 1;
  uint32_t topk_groups = 1;
  RouteGroupScore group_score = ROUTE_GROUP_MAX;
  bool renormalize = true;
  float renormalize_epsilon = 0;
  float scale = 1;
};

/// Added to the sum of a token's weights before they are divided by it, where the caller names nothing. DeepSeek-V3 and
/// its descendants guard the sum of sigmoid scores, which may underflow; a softmax cannot.
constexpr float default_renormalize_epsilon(RouteScoring scoring) {
  return scoring == ROUTE_SIGMOID || scoring == ROUTE_SQRT_SOFTPLUS ? 1e-20f : 0.0f;
}

/// logits [T, E] of any float dtype and strides; bias [E] contiguous or absent; weights_out fp32 [T, top_k] and ids_out
/// int32 [T, top_k], contiguous. One dispatch; none for T = 0.
void encode_route(CommandStream& stream, MoeEngine& engine, const TensorView& logits, const TensorView& bias,
                  uint32_t top_k, const RoutingOptions& options, BufferView weights_out, BufferView ids_out);

} // namespace metal_moe
