#include "encode_route.h"

namespace metal_moe {

void encode_route(CommandStream& stream, MoeEngine& engine, const TensorView& logits, const TensorView& bias,
                  uint32_t top_k, const RoutingOptions& options, BufferView weights_out, BufferView ids_out) {
  RouteArgs args{};
  args.tokens = size_argument("tokens of router_logits", logits.shape[0]);
  args.experts = size_argument("experts of router_logits", logits.shape[1]);
  if (args.tokens == 0)
    return;
  args.top_k = top_k;
  args.logits_token_stride = stride_argument("token stride of router_logits", logits, 0);
  args.logits_expert_stride = stride_argument("expert stride of router_logits", logits, 1);
  args.logits_type = static_cast<uint32_t>(logits.dtype);
  args.has_bias = bool(bias);
  args.bias_type = bias ? static_cast<uint32_t>(bias.dtype) : 0;
  args.scoring = options.scoring;
  args.groups = options.groups;
  args.topk_groups = options.topk_groups;
  args.group_score = options.group_score;
  args.renormalize = options.renormalize;
  args.renormalize_epsilon = options.renormalize_epsilon;
  args.scale = options.scale;

  const Pipeline& pipeline = engine.pipeline(ROUTE_KERNEL);
  const uint32_t tokens_per_group = simdgroups(ROUTE_SIMDGROUPS, pipeline.simd_width);
  stream.use(pipeline);
  stream.bind(0, logits.view());
  stream.bind(1, bias ? bias.view() : logits.view());
  stream.bind(2, weights_out);
  stream.bind(3, ids_out);
  stream.bind_value(4, args);
  stream.dispatch(MTL::Size(ceil_div(args.tokens, tokens_per_group), 1, 1), tokens_per_group * pipeline.simd_width,
                  size_t(args.tokens) * (args.experts * logits.item_size + top_k * 8));
}

} // namespace metal_moe
