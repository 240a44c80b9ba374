// route: router logits -> the ids and weights of the top_k experts of every token, in one dispatch.
//
//   score   s_e = softmax(l)_e | sigmoid(l_e) | sqrt(softplus(l_e)) | l_e             (by args.scoring, in fp32)
//   choice  c_e = s_e + bias_e, or, without a bias, l_e itself: every score grows with its logit, so the order is the
//           same, and it neither ties where a score saturates nor depends on how an engine rounds exp
//   groups  of the `groups` runs of E / groups consecutive experts only the `topk_groups` best stay eligible, by their
//           largest c_e or by the sum of their two largest s_e (+ bias_e)
//   ids     the top_k eligible experts by c_e, largest first
//   weights s_e of those, TOPK_SOFTMAX: softmax over those; / (their sum + epsilon) where asked; * scale
//
// Defined for every input: equal choices go to the lower id; a NaN logit counts as -inf, with score 0 and no bias; an
// infinite logit counts as the largest finite one of its sign, and one of -inf has softmax 0. Where fewer than top_k
// experts are eligible the lowest other ids follow. A token whose logits are all NaN (or -inf) gets ids 0 .. top_k - 1
// and softmax weights 0. A weight is never NaN.
//
// Arguments: see route.h. A token is one simdgroup; lane l holds experts l, l + SIMD_WIDTH, ... in registers as integer
// keys that order like the numbers (the largest key, then the lowest id that has it: two integer reductions per chosen
// expert, no float compares, and loops that vectorise where a simdgroup is one lane). No threadgroup memory.
//
// Bytes per token: E logits (and E biases) read once, 8 * top_k written.
#include "activation.h"
#include "route.h"

constexpr constant uint EXPERTS_PER_LANE = (ROUTE_MAX_EXPERTS + SIMD_WIDTH - 1) / SIMD_WIDTH;
constexpr constant uint CHOSEN_PER_LANE = (ROUTE_MAX_TOP_K + SIMD_WIDTH - 1) / SIMD_WIDTH;
constexpr constant uint LANE_SIMDGROUPS = simdgroups(ROUTE_SIMDGROUPS, SIMD_WIDTH);
constexpr constant uint THREADS = LANE_SIMDGROUPS * SIMD_WIDTH;

// Per-lane arrays stay in a GPU's registers only where every index is a constant.
#if SIMD_WIDTH == 1
#define FOR_LANE_EXPERTS(i) for (uint i = 0; i < args.experts; ++i)
#else
#define FOR_LANE_EXPERTS(i)                                                                                            \
  UNROLL                                                                                                               \
  for (uint i = 0; i < EXPERTS_PER_LANE; ++i)                                                                          \
    if (i * SIMD_WIDTH >= args.experts)                                                                                \
      break;                                                                                                           \
    else
#endif

constexpr constant uint SIGN_BIT = 0x80000000u;
constexpr constant uint INFINITY_BITS = 0x7F800000u;
constexpr constant uint LARGEST_FINITE_BITS = 0x7F7FFFFFu;

// Keys: an expert that is taken (or does not exist) < one outside the chosen groups < NaN < any number.
constexpr constant uint KEY_TAKEN = 0;
constexpr constant uint KEY_INELIGIBLE = 1;
constexpr constant uint KEY_NAN = 2;
/// The key of the lowest finite number, which -inf shares.
constexpr constant uint KEY_LOWEST = SIGN_BIT - 1 - LARGEST_FINITE_BITS;

/// An integer that orders like `x`; infinities count as the largest finite numbers and -0 as 0. Works on the bits: a
/// compiler that assumes finite numbers would drop the comparisons.
inline uint order_key(float x) {
  const uint bits = as_type<uint>(x);
  const uint absolute = bits & ~SIGN_BIT;
  const uint magnitude = min(absolute, LARGEST_FINITE_BITS);
  const uint key = (bits & SIGN_BIT) != 0 && magnitude != 0 ? SIGN_BIT - 1 - magnitude : SIGN_BIT | magnitude;
  return absolute > INFINITY_BITS ? KEY_NAN : key;
}

/// The number of a key, finite: what is no number gives the lowest one.
inline float key_value(uint key) {
  const uint number = max(key, KEY_LOWEST);
  return as_type<float>((number & SIGN_BIT) != 0 ? number & ~SIGN_BIT : SIGN_BIT | (SIGN_BIT - 1 - number));
}

/// e^(logit - largest); 0 for -inf and NaN, even where `largest` is no more than that.
inline float softmax_term(uint logit_key, float largest) {
  return logit_key > KEY_LOWEST ? exp(key_value(logit_key) - largest) : 0.0f;
}

/// sqrt(log(1 + e^x)), to rounding for every x: the factor undoes the rounding of 1 + t, and below -20, where
/// log(1 + e^x) is e^x to fp32, the root is taken in the exponent, where it cannot underflow.
inline float sqrt_softplus(float x) {
  const float t = exp(-fabs(x));
  const float u = 1.0f + t;
  const float root = sqrt(max(x, 0.0f) + (u == 1.0f ? t : log(u) * (t / (u - 1.0f))));
  return x < -20.0f ? exp(0.5f * x) : root;
}

/// From a logit to its score; the softmax needs the largest logit and the sum of all terms.
struct Score {
  uint scoring;
  float largest;
  float sum;

  float of(uint logit_key) const {
    switch (scoring) {
    case ROUTE_SOFTMAX:
      return sum > 0.0f ? softmax_term(logit_key, largest) / sum : 0.0f;
    case ROUTE_SIGMOID:
      return sigmoid(key_value(logit_key));
    case ROUTE_SQRT_SOFTPLUS:
      return sqrt_softplus(key_value(logit_key));
    default:
      return key_value(logit_key);
    }
  }
};

/// The lowest of the experts with the largest key.
inline uint best_expert(thread const uint (&keys)[EXPERTS_PER_LANE], constant RouteArgs& args, uint lane) {
  uint largest = 0;
  FOR_LANE_EXPERTS(i) largest = max(largest, keys[i]);
  largest = simd_max(largest);
  uint best = NO_EXPERT;
  FOR_LANE_EXPERTS(i) best = min(best, keys[i] == largest ? i * SIMD_WIDTH + lane : NO_EXPERT);
  return simd_min(best);
}

/// The key of group `group`, by the choice keys of its experts first .. first + size - 1.
inline uint group_key(thread const uint (&keys)[EXPERTS_PER_LANE], thread const Score& score, constant RouteArgs& args,
                      uint first, uint size, uint lane) {
  uint best = KEY_TAKEN, second = KEY_TAKEN;
  FOR_LANE_EXPERTS(i) {
    const uint key = i * SIMD_WIDTH + lane - first < size ? keys[i] : KEY_TAKEN;
    second = max(second, min(best, key));
    best = max(best, key);
  }
  const uint largest = simd_max(best);
  if (args.group_score == ROUTE_GROUP_MAX || size == 1)
    return largest;
  // One lane gives up the largest; the largest of what all lanes then hold is the second of the group.
  const uint owner = simd_min(best == largest ? lane : uint(SIMD_WIDTH));
  const uint runner_up = simd_max(lane == owner ? second : best);
  const bool biased = args.has_bias != 0;
  return order_key(biased ? key_value(largest) + key_value(runner_up) : score.of(largest) + score.of(runner_up));
}

/// Makes the experts outside the best topk_groups groups ineligible.
inline void keep_best_groups(thread uint (&keys)[EXPERTS_PER_LANE], thread const Score& score, constant RouteArgs& args,
                             uint lane) {
  const uint size = args.experts / args.groups;
  uint group_keys[EXPERTS_PER_LANE]; // every expert holds the key of its group
  for (uint first = 0; first < args.experts; first += size) {
    const uint key = group_key(keys, score, args, first, size, lane);
    FOR_LANE_EXPERTS(i) group_keys[i] = i * SIMD_WIDTH + lane - first < size ? key : group_keys[i];
  }
  FOR_LANE_EXPERTS(i) group_keys[i] = i * SIMD_WIDTH + lane < args.experts ? group_keys[i] : KEY_TAKEN;
  for (uint kept = 0; kept < args.topk_groups; ++kept) {
    const uint first = best_expert(group_keys, args, lane) / size * size;
    FOR_LANE_EXPERTS(i) group_keys[i] = i * SIMD_WIDTH + lane - first < size ? KEY_TAKEN : group_keys[i];
  }
  FOR_LANE_EXPERTS(i) keys[i] = group_keys[i] == KEY_TAKEN ? keys[i] : KEY_INELIGIBLE;
}

[[kernel, max_total_threads_per_threadgroup(THREADS)]]
void route(device const uchar* logits [[buffer(0)]], device const uchar* bias [[buffer(1)]],
           device float* weights [[buffer(2)]], device int* ids [[buffer(3)]], constant RouteArgs& args [[buffer(4)]],
           uint threadgroup_position [[threadgroup_position_in_grid]],
           uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint token = threadgroup_position * LANE_SIMDGROUPS + simdgroup;
  if (token >= args.tokens)
    return;
  const ulong row = ulong(token) * args.logits_token_stride;

  uint keys[EXPERTS_PER_LANE];
  uint largest = KEY_TAKEN;
  FOR_LANE_EXPERTS(i) {
    const uint expert = i * SIMD_WIDTH + lane;
    keys[i] = KEY_TAKEN;
    if (expert < args.experts)
      keys[i] = order_key(load_scalar(logits, row + ulong(expert) * args.logits_expert_stride, args.logits_type));
    largest = max(largest, keys[i]);
  }

  // A renormalised softmax is the softmax over the chosen: the other terms cancel, unless choosing needs them.
  const bool limited = args.topk_groups < args.groups;
  const bool softmax_of_chosen = args.scoring == ROUTE_TOPK_SOFTMAX ||
                                 (args.scoring == ROUTE_SOFTMAX && args.renormalize && args.renormalize_epsilon == 0);
  const bool chosen_by_score = args.has_bias || (limited && args.group_score == ROUTE_GROUP_TOP2_SUM);
  Score score = {args.scoring, key_value(simd_max(largest)), 0.0f};
  if (args.scoring == ROUTE_SOFTMAX && (chosen_by_score || !softmax_of_chosen)) {
    FOR_LANE_EXPERTS(i) score.sum += softmax_term(keys[i], score.largest);
    score.sum = simd_sum(score.sum);
  }

  // From keys of logits to keys of choices: a NaN becomes the lowest number.
  FOR_LANE_EXPERTS(i) {
    const uint expert = i * SIMD_WIDTH + lane;
    if (expert < args.experts) {
      if (args.has_bias != 0 && keys[i] != KEY_NAN)
        keys[i] = order_key(score.of(keys[i]) + load_scalar(bias, expert, args.bias_type));
      keys[i] = max(keys[i], KEY_LOWEST);
    }
  }
  if (limited)
    keep_best_groups(keys, score, args, lane);

  // Lane r % SIMD_WIDTH keeps the r-th choice.
  uint chosen[CHOSEN_PER_LANE];
  for (uint j = 0; j < CHOSEN_PER_LANE; ++j) {
    chosen[j] = 0;
    for (uint l = 0; l < SIMD_WIDTH && j * SIMD_WIDTH + l < args.top_k; ++l) {
      const uint best = best_expert(keys, args, lane);
      FOR_LANE_EXPERTS(i) keys[i] = i * SIMD_WIDTH + lane == best ? KEY_TAKEN : keys[i];
      chosen[j] = lane == l ? best : chosen[j];
    }
  }

  uint chosen_keys[CHOSEN_PER_LANE];
  uint largest_chosen = KEY_TAKEN;
  for (uint j = 0; j < CHOSEN_PER_LANE; ++j) {
    chosen_keys[j] = KEY_TAKEN;
    if (j * SIMD_WIDTH + lane < args.top_k)
      chosen_keys[j] =
          order_key(load_scalar(logits, row + ulong(chosen[j]) * args.logits_expert_stride, args.logits_type));
    largest_chosen = max(largest_chosen, chosen_keys[j]);
  }
  if (softmax_of_chosen) {
    score.scoring = ROUTE_SOFTMAX;
    score.largest = key_value(simd_max(largest_chosen));
    score.sum = 0.0f;
    for (uint j = 0; j < CHOSEN_PER_LANE; ++j)
      score.sum += softmax_term(chosen_keys[j], score.largest);
    score.sum = simd_sum(score.sum);
  }

  float chosen_weights[CHOSEN_PER_LANE];
  float sum = 0.0f;
  for (uint j = 0; j < CHOSEN_PER_LANE; ++j) {
    chosen_weights[j] = j * SIMD_WIDTH + lane < args.top_k ? score.of(chosen_keys[j]) : 0.0f;
    sum += chosen_weights[j];
  }
  sum = simd_sum(sum) + args.renormalize_epsilon;
  for (uint j = 0; j < CHOSEN_PER_LANE; ++j) {
    const uint slot = j * SIMD_WIDTH + lane;
    if (slot < args.top_k) {
      float weight = chosen_weights[j];
      if (args.renormalize != 0)
        weight = sum > 0.0f ? weight / sum : 0.0f;
      weights[ulong(token) * args.top_k + slot] = weight * args.scale;
      ids[ulong(token) * args.top_k + slot] = int(chosen[j]);
    }
  }
}
