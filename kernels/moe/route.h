// Arguments of `route`: router logits -> the ids and weights of each token's experts.
#pragma once
#include "../tiles/scalar.h"

/// Largest number of experts and of experts per token that `route` accepts.
SHARED_CONSTANT uint ROUTE_MAX_EXPERTS = 1024;
SHARED_CONSTANT uint ROUTE_MAX_TOP_K = 16;

/// How a logit becomes a score. TOPK_SOFTMAX chooses by logit and then takes the softmax of the chosen ones only.
enum RouteScoring : uint { ROUTE_SOFTMAX = 0, ROUTE_SIGMOID = 1, ROUTE_SQRT_SOFTPLUS = 2, ROUTE_TOPK_SOFTMAX = 3 };

/// How a group of experts is scored where only `topk_groups` of `groups` may be chosen from.
enum RouteGroupScore : uint { ROUTE_GROUP_MAX = 0, ROUTE_GROUP_TOP2_SUM = 1 };

// Buffers: 0 logits, 1 correction bias (any buffer where has_bias is 0), 2 weights out fp32 [T, top_k],
// 3 ids out int32 [T, top_k], 4 RouteArgs. One simdgroup per token, ROUTE_SIMDGROUPS tokens per threadgroup.
SHARED_CONSTANT uint ROUTE_SIMDGROUPS = 4;

struct RouteArgs {
  uint tokens;               // T
  uint experts;              // E
  uint top_k;                // k
  uint logits_token_stride;  // elements
  uint logits_expert_stride; // elements
  uint logits_type;          // ScalarType
  uint has_bias;             // 0 or 1: correction bias [E], contiguous, added to scores for the choice only
  uint bias_type;            // ScalarType
  uint scoring;              // RouteScoring
  uint groups;               // 1: no group limit; divides E
  uint topk_groups;          // groups that may be chosen from
  uint group_score;          // RouteGroupScore
  uint renormalize;          // 0 or 1: divide the k weights by (their sum + renormalize_epsilon)
  float renormalize_epsilon; // 1e-20 for the DeepSeek-V3 family, else 0
  float scale;               // multiplies the weights last
};
