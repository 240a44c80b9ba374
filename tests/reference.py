"""What metal_moe must compute, in float64, written from the formulas and from nothing else.

Everything is numpy float64 and as plain as it can be: one loop over tokens for routing and grouping, one matrix product
per expert for the layer. Inputs are the tensors a test gives to metal_moe, already rounded to their dtype, so that the
only difference left is the rounding inside the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


def to_double(tensor: torch.Tensor | None) -> np.ndarray | None:
    """The exact values of a tensor of any float dtype."""
    return None if tensor is None else tensor.detach().double().cpu().numpy()


FLOAT32_MAX = float(np.finfo(np.float32).max)


# --- routing -----------------------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Of one row. All -inf: all 0, because nothing is chosen with any weight."""
    if x.size == 0 or np.max(x) == -np.inf:
        return np.zeros_like(x)
    e = np.exp(x - np.max(x))
    return e / e.sum()


def descending(values: np.ndarray) -> np.ndarray:
    """Indices from the largest value to the smallest; of equal values the lower index first."""
    return np.argsort(-values, kind="stable")


@dataclass
class Routing:
    weights: np.ndarray  # [T, k]
    ids: np.ndarray  # [T, k] int64
    choice: np.ndarray  # [T, E] what is ranked: -inf where an expert cannot be chosen


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: torch.Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    renormalize: bool = True,
    renormalize_epsilon: float | None = None,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    """The experts of each token and their weights.

    scores  = softmax(l) | sigmoid(l) | sqrt(log(1 + exp(l))) | l itself (`topk_softmax`)
    choice  = scores + correction_bias; without a bias l itself, which ranks the same because every score grows with it
    groups  ranked by their largest choice, or by the sum of their two largest scores (+ bias); only the experts of the
            best `topk_group` can be chosen
    ids     = the `top_k` best by choice, best first, the lower id first where equal
    weights = scores[ids] (`topk_softmax`: softmax of the chosen logits), renormalised, scaled

    A NaN logit counts as -inf, and its choice as the lowest number, whatever its bias; infinite logits count as the
    largest finite float32 of their sign, but for the softmax, in which -inf takes no part. No weight is NaN.
    """
    if renormalize_epsilon is None:
        renormalize_epsilon = 1e-20 if scoring in ("sigmoid", "sqrt_softplus") else 0.0
    rows = to_double(logits)
    tokens, experts = rows.shape
    weights = np.zeros((tokens, top_k))
    ids = np.zeros((tokens, top_k), dtype=np.int64)
    choices = np.zeros((tokens, experts))
    for token in range(tokens):
        missing = np.isnan(rows[token])
        row = np.where(missing, -np.inf, rows[token])
        finite = np.clip(row, -FLOAT32_MAX, FLOAT32_MAX)
        if scoring == "softmax":
            score = softmax(np.minimum(row, FLOAT32_MAX))
        elif scoring == "sigmoid":
            score = sigmoid(finite)
        elif scoring == "sqrt_softplus":
            score = np.sqrt(np.logaddexp(0.0, finite))
        else:
            score = finite
        ranked = score if correction_bias is None else score + to_double(correction_bias)
        choice = finite if correction_bias is None else ranked
        ranked, choice = (np.where(missing, -FLOAT32_MAX, values) for values in (ranked, choice))
        if num_expert_group > 1:
            size = experts // num_expert_group
            if group_score == "max":
                ranks = choice.reshape(-1, size).max(axis=1)
            else:
                ranks = np.sort(ranked.reshape(-1, size), axis=1)[:, -2:].sum(axis=1)
            allowed = np.zeros(num_expert_group, dtype=bool)
            allowed[descending(ranks)[:topk_group]] = True
            choice = np.where(np.repeat(allowed, size), choice, -np.inf)
        chosen = descending(choice)[:top_k]
        weight = softmax(np.minimum(row, FLOAT32_MAX)[chosen]) if scoring == "topk_softmax" else score[chosen]
        if renormalize:
            total = weight.sum() + renormalize_epsilon
            weight = weight / total if total != 0 else np.zeros(top_k)
        weights[token] = weight * routed_scaling_factor
        ids[token] = chosen
        choices[token] = choice
    return Routing(weights, ids, choices)


# --- grouping ----------------------------------------------------------------------------------------------------


@dataclass
class Grouping:
    offsets: np.ndarray  # [E + shared + 1]
    sorted_rows: np.ndarray  # [S], -1 behind the last row
    inverse: np.ndarray  # [S], -1 where dropped
    tiles: list[tuple[int, int, int]]  # (expert, first row, rows), in order


def group(ids: torch.Tensor, experts: int, *, row_tile: int = 16, shared: int = 0) -> Grouping:
    """The assignments (token, slot) in the order of their expert, and that order cut into tiles of one expert each."""
    rows = ids.tolist()
    slots = (ids.shape[1] if ids.ndim == 2 else 0) + shared
    members: list[list[int]] = [[] for _ in range(experts + shared)]
    inverse = np.full(len(rows) * slots, -1, dtype=np.int64)
    for token, row in enumerate(rows):
        for slot, expert in enumerate(row + [experts + s for s in range(shared)]):
            if 0 <= expert < experts or slot >= slots - shared:
                members[expert].append(token * slots + slot)
    offsets = np.concatenate([[0], np.cumsum([len(m) for m in members])]).astype(np.int64)
    order = [a for m in members for a in m]
    sorted_rows = np.full(len(rows) * slots, -1, dtype=np.int64)
    sorted_rows[: len(order)] = order
    inverse[order] = np.arange(len(order))
    tiles = [
        (expert, int(offsets[expert]) + start, min(row_tile, len(m) - start))
        for expert, m in enumerate(members)
        for start in range(0, len(m), row_tile)
    ]
    return Grouping(offsets, sorted_rows, inverse, tiles)


def pad(grouping: Grouping, capacity: int) -> np.ndarray:
    """[experts, capacity]: the first `capacity` assignments of each expert, then -1."""
    experts = len(grouping.offsets) - 1
    padded = np.full((experts, capacity), -1, dtype=np.int64)
    for expert in range(experts):
        rows = grouping.sorted_rows[grouping.offsets[expert] : grouping.offsets[expert + 1]][:capacity]
        padded[expert, : len(rows)] = rows
    return padded


# --- experts -----------------------------------------------------------------------------------------------------

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(gate: np.ndarray | None, up: np.ndarray, name: str, alpha: float = 1.702, limit: float = 7.0):
    """h from the two halves of the first product; `relu2` has no gate."""
    if name == "silu":
        return gate * sigmoid(gate) * up
    if name == "gelu":
        return 0.5 * gate * (1.0 + (_erf(gate / math.sqrt(2.0)) if gate.size else gate)) * up
    if name == "gelu_tanh":
        return 0.5 * gate * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "relu2":
        return np.maximum(up, 0.0) ** 2
    if name == "swiglu_clamp":
        gate = np.minimum(gate, limit)
        up = np.clip(up, -limit, limit)
        return gate * sigmoid(alpha * gate) * (up + 1.0)
    raise ValueError(name)


def mlp(x, w1, w2, b1=None, b2=None, *, activation="silu", interleaved=False, alpha=1.702, limit=7.0):
    """One expert: x [n, H], w1 [2I, H] ([I, H] for relu2), w2 [H, I] -> [n, H]."""
    first = x @ w1.T
    if b1 is not None:
        first = first + b1
    if activation == "relu2":
        gate, up = None, first
    elif interleaved:
        gate, up = first[:, 0::2], first[:, 1::2]
    else:
        gate, up = np.split(first, 2, axis=1)
    out = activate(gate, up, activation, alpha, limit) @ w2.T
    return out if b2 is None else out + b2


def experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    shared_w1: torch.Tensor | None = None,
    shared_w2: torch.Tensor | None = None,
    shared_weights: torch.Tensor | None = None,
) -> np.ndarray:
    """out[t] = sum over slots of weight * expert(x[t]), plus the shared experts; ids outside 0..E-1 add nothing."""
    x = to_double(hidden_states)
    weights = to_double(topk_weights)
    ids = topk_ids.cpu().numpy()
    form = {"activation": activation, "interleaved": interleaved, "alpha": alpha, "limit": limit}
    out = np.zeros((x.shape[0], w2.shape[1]))
    for expert in range(w1.shape[0]):
        tokens, slots = np.nonzero(ids == expert)
        if len(tokens) == 0:
            continue
        b1 = None if w1_bias is None else to_double(w1_bias[expert])
        b2 = None if w2_bias is None else to_double(w2_bias[expert])
        rows = mlp(x[tokens], to_double(w1[expert]), to_double(w2[expert]), b1, b2, **form)
        np.add.at(out, tokens, rows * weights[tokens, slots, None])
    for shared in range(0 if shared_w1 is None else shared_w1.shape[0]):
        rows = mlp(x, to_double(shared_w1[shared]), to_double(shared_w2[shared]), **form)
        out += rows if shared_weights is None else rows * to_double(shared_weights)[:, shared, None]
    return out
