"""The same layer by other means of PyTorch: what `fused_moe` is measured beside.

All take given routes and compute silu-gated experts and shared experts (each with weight 1), with the rounding of
their own dtype. Peers are written as well as PyTorch allows: rows are sorted once, no expert without tokens is touched.
"""

import torch
from torch import Tensor

from . import reference


def expert_loop(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
) -> Tensor:
    """A Python loop over the experts in use, as eager model code does; needs the counts on the host."""
    order, tokens, offsets = _by_expert(topk_ids, w1.shape[0])
    rows = hidden_states[tokens]
    parts = []
    first = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > first:
            inner = reference.activate(rows[first:end] @ w1[expert].T)
            parts.append(inner @ w2[expert].T)
            first = end
    if not parts:
        return torch.zeros_like(hidden_states)
    out = _combine(torch.cat(parts), order, topk_weights)
    return _add_shared(out, hidden_states, shared_w1, shared_w2)


def grouped_matmul(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
) -> Tensor:
    """Two grouped matrix products of PyTorch over rows sorted by expert; no host reads, so CUDA graphs can hold it."""
    order, tokens, offsets = _by_expert(topk_ids, w1.shape[0])
    inner = reference.activate(_grouped_mm(hidden_states[tokens], w1.transpose(1, 2), offs=offsets))
    out = _combine(_grouped_mm(inner, w2.transpose(1, 2), offs=offsets), order, topk_weights)
    return _add_shared(out, hidden_states, shared_w1, shared_w2)


def naive_indexing(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
) -> Tensor:
    """Weights copied for every assignment by advanced indexing, then batched products.

    Holds `naive_indexing_bytes` at once.
    """
    tokens, top_k = topk_ids.shape
    ids = topk_ids.flatten()
    rows = hidden_states.repeat_interleave(top_k, 0)
    inner = reference.activate(torch.bmm(w1[ids], rows[..., None]).squeeze(-1))
    results = torch.bmm(w2[ids], inner[..., None]).squeeze(-1).view(tokens, top_k, -1)
    out = (results * topk_weights[..., None].to(results.dtype)).sum(1)
    return _add_shared(out, hidden_states, shared_w1, shared_w2)


def naive_indexing_bytes(w1: Tensor, topk_ids: Tensor) -> int:
    """Bytes of the larger gathered copy, that of `w1`; the copy of `w2` follows after it is freed."""
    return topk_ids.numel() * w1[0].numel() * w1.element_size()


def grouped_matmul_runs(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch has a grouped matrix product for the device and dtype; tried on a tiny one."""
    if _grouped_mm is None:
        return False
    try:
        rows = torch.ones(4, 16, device=device, dtype=dtype)
        weights = torch.ones(2, 16, 16, device=device, dtype=dtype)
        offsets = torch.tensor([1, 4], device=device, dtype=torch.int32)
        result = _grouped_mm(rows, weights.transpose(1, 2), offs=offsets)
        return bool((result == 16).all())
    except (RuntimeError, NotImplementedError, TypeError):
        return False


# Public since PyTorch 2.10; the private name is older.
_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _by_expert(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments sorted by expert, the token of each, and where each expert's end.

    Without bincount, which reads its largest value back to the host on CUDA devices.
    """
    ids, order = topk_ids.flatten().sort(stable=True)
    each = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, each, right=True, out_int32=True)
    return order, order // topk_ids.shape[1], ends


def _combine(rows: Tensor, order: Tensor, topk_weights: Tensor) -> Tensor:
    """Rows in sorted order -> weighted sums per token."""
    tokens, top_k = topk_weights.shape
    by_slot = torch.empty_like(rows)
    by_slot[order] = rows
    return (by_slot.view(tokens, top_k, -1) * topk_weights[..., None].to(rows.dtype)).sum(1)


def _add_shared(out: Tensor, hidden_states: Tensor, shared_w1: Tensor | None, shared_w2: Tensor | None) -> Tensor:
    for expert in range(0 if shared_w1 is None else shared_w1.shape[0]):
        out = out + reference.activate(hidden_states @ shared_w1[expert].T) @ shared_w2[expert].T
    return out
