#include "fused_moe.h"

namespace metal_moe {

SlotsView ids_view(const TensorView& ids) {
  return {ids.view(), stride_argument("token stride of topk_ids", ids, 0),
          stride_argument("slot stride of topk_ids", ids, 1), ids.dtype == Dtype::Int64 ? 2u : 1u};
}

SlotsView weights_view(const TensorView& weights) {
  return {weights.view(), stride_argument("token stride of topk_weights", weights, 0),
          stride_argument("slot stride of topk_weights", weights, 1), static_cast<uint32_t>(weights.dtype)};
}

namespace {

/// As encode_route writes them: contiguous int32 and fp32.
SlotsView routed_ids(uint32_t top_k) { return {{}, top_k, 1, 1}; }
SlotsView routed_weights(uint32_t top_k) { return {{}, top_k, 1, SCALAR_FP32}; }

} // namespace

ExpertsPacking pack_routed_experts(const MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                                   uint32_t top_k) {
  return pack_experts(engine, x, layer, routed_ids(top_k), routed_weights(top_k), top_k);
}

void encode_fused_moe(CommandStream& stream, MoeEngine& engine, const TensorView& x, const ExpertsLayer& layer,
                      const TensorView& logits, const TensorView& bias, uint32_t top_k, const RoutingOptions& options,
                      const TensorView& out, const ExpertsPacking* packing) {
  SlotsView ids = routed_ids(top_k), weights = routed_weights(top_k);
  const auto assignments = static_cast<size_t>(x.shape[0]) * top_k;
  if (assignments > 0) {
    ids.view = stream.scratch(assignments * sizeof(int32_t));
    weights.view = stream.scratch(assignments * sizeof(float));
  }
  encode_route(stream, engine, logits, bias, top_k, options, weights.view, ids.view);
  if (packing)
    encode_experts(stream, engine, *packing, x, layer, ids, weights, out);
  else
    encode_experts(stream, engine, x, layer, ids, weights, top_k, out);
}

} // namespace metal_moe
