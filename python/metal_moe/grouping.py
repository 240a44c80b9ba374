"""Assignments sorted by expert: what a grouped matrix product over experts reads."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _core
from ._operator import engine_of, operator
from ._validate import check_devices, check_grouping

__all__ = ["GroupedTokens", "group_tokens"]


class GroupedTokens(NamedTuple):
    """Result of `group_tokens`. S = T * (k + shared_experts) assignments, all tensors int32.

    Assignment a = token * (k + shared_experts) + slot; the shared experts are the experts E, E + 1, ... in the slots
    after the first k.
    """

    offsets: Tensor
    """[E + shared_experts + 1]: expert e owns the sorted places offsets[e] up to offsets[e + 1]."""
    sorted_rows: Tensor
    """[S]: the assignment at each sorted place; by expert, then by assignment. -1 after offsets[-1]."""
    inverse: Tensor
    """[S]: the sorted place of each assignment; -1 where its id was outside 0..E-1."""
    tiles: Tensor
    """[max_tiles, 4]: (expert, first sorted place, rows, 0) of each row tile; rows is 0 in tiles not needed."""
    padded: Tensor | None
    """[E + shared_experts, capacity]: the first `capacity` assignments of each expert, then -1; or None."""


def group_tokens(
    topk_ids: Tensor,
    num_experts: int,
    *,
    row_tile: int = 16,
    shared_experts: int = 0,
    capacity: int | None = None,
) -> GroupedTokens:
    """Sorts all (token, slot) assignments by expert with a stable counting sort on the device; the host reads nothing.

    Args:
        topk_ids: [T, k] int32 or int64, any strides; ids outside 0..num_experts-1 are dropped.
            T * (k + shared_experts) is at most 2**22.
        num_experts: E, the number of routed experts. E + shared_experts is at most 1024.
        row_tile: the most rows in one tile of `tiles`.
        shared_experts: experts beyond the routed ones that every token uses.
        capacity: also pad every expert to this many assignments (`padded`); assignments beyond it are left out of
            `padded` alone.

    Returns:
        GroupedTokens(offsets, sorted_rows, inverse, tiles, padded).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a shape, device or value outside what is stated above; the message names the argument.
        RuntimeError: a kernel failed.

    Example:
        >>> ids = torch.tensor([[2, 0], [2, 1]])
        >>> group = metal_moe.group_tokens(ids, 3, row_tile=2)
        >>> group.offsets.tolist(), group.sorted_rows.tolist()
        ([0, 1, 2, 4], [1, 3, 0, 2])
    """
    offsets, sorted_rows, inverse, tiles, padded = _group_tokens(
        topk_ids, num_experts, row_tile, shared_experts, capacity
    )
    return GroupedTokens(offsets, sorted_rows, inverse, tiles, None if capacity is None else padded)


# The operator has the name of the public function, which gives names to the results.
@operator(name="group_tokens")
def _group_tokens(
    topk_ids: Tensor, num_experts: int, row_tile: int, shared_experts: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_grouping("group_tokens", topk_ids, num_experts, row_tile, shared_experts, capacity)
    check_devices("group_tokens", ("topk_ids",), (topk_ids,))
    tokens, top_k = topk_ids.shape
    experts = num_experts + shared_experts
    assignments = tokens * (top_k + shared_experts)
    # Every expert in use has at most one tile that is not full.
    max_tiles = (assignments + row_tile - 1) // row_tile + torch.sym_min(experts, assignments)
    offsets = topk_ids.new_empty((experts + 1,), dtype=torch.int32)
    sorted_rows = topk_ids.new_empty((assignments,), dtype=torch.int32)
    inverse = topk_ids.new_empty((assignments,), dtype=torch.int32)
    tiles = topk_ids.new_empty((max_tiles, 4), dtype=torch.int32)
    padded = topk_ids.new_empty((experts, capacity or 0), dtype=torch.int32)
    engine = engine_of(offsets)
    if engine is not None:
        _core.group_tokens(
            engine, topk_ids, num_experts, shared_experts, row_tile, offsets, sorted_rows, inverse, tiles
        )
        if capacity is not None:
            _core.pad_groups(engine, offsets, sorted_rows, padded)
    return offsets, sorted_rows, inverse, tiles, padded
