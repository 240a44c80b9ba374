"""`group_tokens`: a stable counting sort of the assignments by expert, and its row tiles; equal, not close."""

import metal_moe
import numpy as np
import pytest
import reference
import torch
from cases import make_ids


def check_grouping(ids, experts, *, row_tile=16, shared=0, capacity=None):
    got = metal_moe.group_tokens(ids, experts, row_tile=row_tile, shared_experts=shared, capacity=capacity)
    expected = reference.group(ids, experts, row_tile=row_tile, shared=shared)
    np.testing.assert_array_equal(got.offsets.numpy(), expected.offsets)
    np.testing.assert_array_equal(got.sorted_rows.numpy(), expected.sorted_rows)
    np.testing.assert_array_equal(got.inverse.numpy(), expected.inverse)
    tiles = [tuple(tile[:3]) for tile in got.tiles.tolist()]
    used = [tile for tile in tiles if tile[2] != 0]
    assert used == expected.tiles
    assert tiles[: len(used)] == used, "unused tiles stand behind the used ones"
    if capacity is None:
        assert got.padded is None
    else:
        np.testing.assert_array_equal(got.padded.numpy(), reference.pad(expected, capacity))
    return got


@pytest.mark.parametrize("routing", ["random", "few", "one", "dropped", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
def test_tokens(tokens, routing):
    generator = torch.Generator().manual_seed(tokens)
    check_grouping(make_ids(tokens, 24, 4, routing, generator), 24)


@pytest.mark.parametrize("experts", [1, 2, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 448, 449, 512, 1000, 1024])
def test_experts(experts):
    """Up to the limit: fewer simdgroups count where there are many experts."""
    generator = torch.Generator().manual_seed(experts)
    for tokens in (1, 50, 700):
        check_grouping(make_ids(tokens, experts, min(8, experts), "random", generator), experts)


@pytest.mark.parametrize("top_k", range(1, 11))
def test_every_top_k(top_k):
    check_grouping(make_ids(45, 16, top_k, "random", torch.Generator().manual_seed(top_k)), 16, row_tile=8)


@pytest.mark.parametrize("row_tile", [1, 2, 4, 7, 8, 16, 32, 64])
@pytest.mark.parametrize("routing", ["random", "one", "dropped"])
def test_row_tiles(row_tile, routing):
    check_grouping(make_ids(130, 12, 3, routing, torch.Generator().manual_seed(1)), 12, row_tile=row_tile)


@pytest.mark.parametrize("shared", [1, 2, 3])
@pytest.mark.parametrize("routing", ["random", "dropped", "none"])
def test_shared_experts_take_every_token(shared, routing):
    got = check_grouping(make_ids(37, 10, 3, routing, torch.Generator().manual_seed(2)), 10, shared=shared)
    counts = got.offsets.diff()
    assert (counts[10:] == 37).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_id_types_and_strides(dtype):
    base = make_ids(80, 20, 8, "dropped", torch.Generator().manual_seed(3)).to(dtype)
    for ids in (base, base[::3], base[:, 1:5], base[:, ::2], base.t().contiguous().t(), base[7:9, 2:7]):
        check_grouping(ids, 20)


def test_wide_ids_are_not_truncated():
    """An int64 id whose low word is a valid expert is still out of range."""
    ids = torch.tensor([[2**32 + 1, 1], [-(2**32), 0], [2**62, 3]])
    got = check_grouping(ids, 4)
    assert got.offsets.tolist() == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("capacity", [1, 2, 5, 16, 64])
def test_padding(capacity):
    """To a uniform batch [E, capacity]; what does not fit is left out, in order."""
    for routing in ("random", "one", "dropped", "none"):
        ids = make_ids(21, 6, 2, routing, torch.Generator().manual_seed(4))
        check_grouping(ids, 6, capacity=capacity)
    check_grouping(ids[:0], 6, capacity=capacity)


def test_many_assignments():
    """Far beyond one threadgroup's counters, against numpy's stable sort."""
    tokens, top_k, experts = 2**17, 8, 256
    ids = torch.randint(-3, experts + 3, (tokens, top_k), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    got = metal_moe.group_tokens(ids, experts, row_tile=32)
    flat = ids.numpy().reshape(-1)
    valid = np.flatnonzero((flat >= 0) & (flat < experts))
    order = valid[np.argsort(flat[valid], kind="stable")]
    counts = np.bincount(flat[valid], minlength=experts)
    np.testing.assert_array_equal(got.offsets.numpy(), np.concatenate([[0], np.cumsum(counts)]))
    np.testing.assert_array_equal(got.sorted_rows.numpy()[: len(order)], order)
    assert (got.sorted_rows.numpy()[len(order) :] == -1).all()
    inverse = np.full(flat.size, -1)
    inverse[order] = np.arange(len(order))
    np.testing.assert_array_equal(got.inverse.numpy(), inverse)
    tiles = got.tiles.numpy()
    used = tiles[tiles[:, 2] != 0]
    assert used[:, 2].sum() == len(order) and len(used) == (-(-counts // 32)).sum()


def test_most_assignments():
    """T * k = 2^22 is allowed, one more is not."""
    ids = (torch.arange(2**22, dtype=torch.int32) % 3).view(-1, 8)
    got = metal_moe.group_tokens(ids, 3)
    assert got.offsets.tolist() == [0, 1398102, 2796203, 4194304]
    assert torch.equal(got.sorted_rows[:1398102], torch.arange(0, 2**22, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="4194304"):
        metal_moe.group_tokens(torch.zeros(2**22 + 1, 1, dtype=torch.int32), 3)
