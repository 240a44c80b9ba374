"""Router logits to experts: which experts each token uses, and with which weights."""

import torch
from torch import Tensor

from . import _core
from ._operator import engine_of, operator
from ._validate import check_devices, check_routing


@operator
def fused_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    renormalize: bool = True,
    renormalize_epsilon: float | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` experts for every token, in one dispatch.

    Scores come from the logits in fp32; the experts with the highest choice scores (score + `correction_bias`) are
    taken, highest first; equal ones by lower id. The weight of a chosen expert is its score without the bias,
    renormalised if asked for, then scaled.

    Args:
        router_logits: [T, E] float32, float16 or bfloat16, any strides. E from 1 to 1024. NaN counts as lowest.
        top_k: experts per token, from 1 to min(E, 16).
        scoring: "softmax" over all experts (Mixtral, Qwen3); "sigmoid" (DeepSeek-V3, GLM-4.5 and later);
            "sqrt_softplus", the square root of softplus (DeepSeek-V4); "topk_softmax": choose by logit, then softmax
            over the chosen (gpt-oss).
        correction_bias: [E] float32, float16 or bfloat16, contiguous: added to the scores for the choice alone.
        num_expert_group: number of equal groups of consecutive experts (DeepSeek-V3: 8); 1 for no group limit.
        topk_group: experts are chosen from this many groups, those with the highest group scores.
        group_score: "max": a group's highest choice score; "top2_sum": the sum of its two highest.
        renormalize: divide the weights of a token by (their sum + `renormalize_epsilon`).
        renormalize_epsilon: None for what the model families use: 1e-20 with "sigmoid" and "sqrt_softplus", else 0.
        routed_scaling_factor: multiplies the weights last.

    Returns:
        (weights, ids): [T, top_k] float32 and [T, top_k] int32, ids from 0 to E - 1.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a shape, device or value outside what is stated above; the message names the argument.
        RuntimeError: gradients were asked for, or a kernel failed.

    Example:
        >>> weights, ids = metal_moe.fused_topk(torch.randn(4, 64), 4, scoring="sigmoid", routed_scaling_factor=1.8)
        >>> weights.shape, ids.dtype
        (torch.Size([4, 4]), torch.int32)
    """
    routing = check_routing(
        "fused_topk",
        router_logits,
        top_k,
        scoring,
        correction_bias,
        num_expert_group,
        topk_group,
        group_score,
        renormalize,
        renormalize_epsilon,
        routed_scaling_factor,
    )
    check_devices("fused_topk", ("router_logits", "correction_bias"), (router_logits, correction_bias))
    shape = (router_logits.shape[0], top_k)
    weights = router_logits.new_empty(shape, dtype=torch.float32)
    ids = router_logits.new_empty(shape, dtype=torch.int32)
    engine = engine_of(weights)
    if engine is not None:
        _core.fused_topk(engine, router_logits, correction_bias, weights, ids, *routing)
    return weights, ids
