"""The layer in plain PyTorch operations, in float64 by default: what results are measured against. Slow on purpose."""

import torch
from torch import Tensor
from torch.nn import functional


def route(
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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """`fused_topk` computed in `dtype`.

    Arguments are those of `fused_topk`, which are not checked here. Returns (weights [T, k] of `dtype`, ids [T, k]
    int64). Logits must be finite.
    """
    logits = _convert(router_logits, dtype)
    if scoring == "softmax":
        scores = logits.softmax(-1)
    elif scoring == "sigmoid":
        scores = logits.sigmoid()
    elif scoring == "sqrt_softplus":
        scores = functional.softplus(logits).sqrt()
    else:
        scores = logits
    choice = scores if correction_bias is None else scores + _convert(correction_bias, dtype)
    if num_expert_group > 1:
        grouped = choice.unflatten(1, (num_expert_group, -1))
        best = grouped.topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
        choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if scoring == "topk_softmax":
        weights = weights.softmax(-1)
    if renormalize:
        if renormalize_epsilon is None:
            renormalize_epsilon = 1e-20 if scoring in ("sigmoid", "sqrt_softplus") else 0.0
        weights = weights / (weights.sum(-1, keepdim=True) + renormalize_epsilon)
    return weights * routed_scaling_factor, ids


def activate(
    rows: Tensor, activation: str = "silu", interleaved: bool = False, alpha: float = 1.702, limit: float = 7.0
) -> Tensor:
    """[S, 2I] gate and up (relu2: [S, I] up) -> [S, I], in the dtype of `rows`."""
    if activation == "relu2":
        return rows.relu().square()
    gate, up = (rows[:, 0::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=1)
    if activation == "silu":
        return functional.silu(gate) * up
    if activation == "gelu":
        return functional.gelu(gate) * up
    if activation == "gelu_tanh":
        return functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_weights: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`fused_experts` computed in `dtype`, one expert at a time, so that one expert's weights are converted at a time.

    Arguments are those of `fused_experts`, which are not checked here. Returns [T, H] of `dtype`.
    """
    x = _convert(hidden_states, dtype)
    out = torch.zeros_like(x)
    topk_ids, topk_weights = topk_ids.to(x.device), _convert(topk_weights, dtype)

    def expert(rows: Tensor, w1: Tensor, w2: Tensor, bias1: Tensor | None, bias2: Tensor | None) -> Tensor:
        inner = rows @ _convert(w1, dtype).T
        if bias1 is not None:
            inner = inner + _convert(bias1, dtype)
        result = activate(inner, activation, interleaved, alpha, limit) @ _convert(w2, dtype).T
        return result if bias2 is None else result + _convert(bias2, dtype)

    for index in topk_ids.unique().tolist():
        if 0 <= index < w1.shape[0]:
            token, slot = (topk_ids == index).nonzero(as_tuple=True)
            bias1 = None if w1_bias is None else w1_bias[index]
            bias2 = None if w2_bias is None else w2_bias[index]
            result = expert(x[token], w1[index], w2[index], bias1, bias2)
            out.index_add_(0, token, result * topk_weights[token, slot, None])
    for index in range(0 if shared_w1 is None else shared_w1.shape[0]):
        result = expert(x, shared_w1[index], shared_w2[index], None, None)
        out += result if shared_weights is None else result * _convert(shared_weights[:, index, None], dtype)
    return out


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a row, relative to that row: max over t of |actual[t] - expected[t]| / |expected[t]|.

    Euclidean norms, in the dtype of `expected`. NaN or infinity in `actual` gives infinity; no rows give 0.
    """
    if actual.numel() == 0:
        return 0.0
    if not actual.isfinite().all():
        return torch.inf
    difference = (_convert(actual, expected.dtype) - expected).norm(dim=1)
    norm = expected.norm(dim=1)
    # A row of zeros has no scale: any difference from it counts in full.
    return (difference / torch.where(norm == 0, 1.0, norm)).max().item()


def _convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in another dtype; on the CPU where its device has no float64."""
    if dtype == torch.float64 and tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.to(dtype)
