"""Nothing outside the tensors is read or written, and nothing unselected leaks in.

Every tensor is cut out of a larger storage filled with NaN (ids: with an expert that is all NaN), at an odd offset, so
that one element read beyond its end shows in the result. Outputs are allocated inside metal_moe; what it writes into
memory that belongs to others shows in the guards around the inputs, which are compared bit for bit.
"""

import metal_moe
import pytest
import torch
from cases import DTYPES, ENGINES, FAMILIES, assert_close, make_layer

GUARD = 37  # elements on each side; odd, so that the payload starts at an odd element


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


class Guarded:
    """Tensors cut out of poisoned storages, which must look the same afterwards."""

    def __init__(self) -> None:
        self.storages: list[tuple[torch.Tensor, torch.Tensor]] = []

    def place(self, tensor: torch.Tensor, poison: float = torch.nan, row_gap: int = 0) -> torch.Tensor:
        """A copy of `tensor` with `row_gap` poisoned elements between its rows and GUARD around it."""
        rows, columns = (tensor.numel() // tensor.shape[-1], tensor.shape[-1]) if tensor.numel() else (0, 0)
        size = rows * (columns + row_gap)
        storage = torch.full((GUARD + size + GUARD,), poison, dtype=tensor.dtype)
        strides = list(tensor.contiguous().stride())
        if row_gap:
            assert tensor.ndim == 2
            strides[0] += row_gap
        view = storage.as_strided(tensor.shape, strides, GUARD)
        view.copy_(tensor)
        self.storages.append((storage, storage.clone()))
        return view

    def check(self) -> None:
        for storage, before in self.storages:
            assert torch.equal(bits(storage), bits(before)), "an input or the memory around it was written to"


def guard_layer(layer, row_gap=11):
    guarded = Guarded()
    layer.hidden_states = guarded.place(layer.hidden_states, row_gap=row_gap)
    layer.w1, layer.w2 = guarded.place(layer.w1), guarded.place(layer.w2)
    layer.topk_weights = guarded.place(layer.topk_weights, row_gap=3)
    layer.topk_ids = guarded.place(layer.topk_ids, poison=0, row_gap=3)
    for name in ("w1_bias", "w2_bias", "shared_w1", "shared_w2"):
        if name in layer.options:
            layer.options[name] = guarded.place(layer.options[name])
    if "shared_weights" in layer.options:
        layer.options["shared_weights"] = guarded.place(layer.options["shared_weights"], row_gap=1)
    return guarded


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "moe_simd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 32), (65, 33), (127, 129), (1, 1), (30, 71)])
def test_surroundings(family, dtype, hidden, intermediate):
    for tokens in (1, 5, 18, 40):
        layer = make_layer(
            tokens, hidden, intermediate, 5, 2, DTYPES[dtype], bias=True, shared=1, shared_weights=True, seed=3
        )
        expected = layer.reference()
        guarded = guard_layer(layer)
        assert_close(layer.run(kernel=family), expected, f"{layer} {family}")
        guarded.check()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "moe_simd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_surroundings_under_exact(use_engine, family, dtype):
    """Every access checked against the tensors' own bounds as well."""
    use_engine("exact")
    for hidden, intermediate, tokens in [(33, 17, 3), (24, 16, 5), (9, 70, 1)]:
        layer = make_layer(
            tokens,
            hidden,
            intermediate,
            4,
            2,
            DTYPES[dtype],
            bias=True,
            shared=1,
            shared_weights=True,
            routing="dropped",
        )
        expected = layer.reference()
        guarded = guard_layer(layer)
        assert_close(layer.run(kernel=family), expected, f"{layer} {family}")
        guarded.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_surroundings_of_aligned_rows(dtype):
    """`moe_simd` reads 16 bytes at a time: rows aligned, poison directly behind the last of them."""
    for tokens in (1, 9, 33):
        layer = make_layer(tokens, 72, 40, 5, 2, DTYPES[dtype])
        expected = layer.reference()
        places = []
        for name in ("hidden_states", "w1", "w2"):
            tensor = getattr(layer, name)
            storage = torch.full((64 + tensor.numel() + 64,), torch.nan, dtype=tensor.dtype)
            offset = (-storage.data_ptr() // tensor.element_size()) % 16 + 16
            view = storage.as_strided(tensor.shape, tensor.contiguous().stride(), offset)
            view.copy_(tensor)
            setattr(layer, name, view)
            places.append((storage, storage.clone()))
        assert_close(layer.run(kernel="moe_simd"), expected, layer)
        assert metal_moe.last_dispatch()["family"].startswith("moe_simd")
        assert all(torch.equal(bits(storage), bits(before)) for storage, before in places)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nan_in_unselected_experts(use_engine, engine, family):
    """Weights that no token selects, and the gaps between used experts, never reach the result."""
    use_engine(engine)
    for tokens in (1, 5) if engine == "exact" else (1, 5, 20, 40):
        layer = make_layer(tokens, 40, 24, 9, 2, torch.bfloat16, bias=True)
        layer.topk_ids = layer.topk_ids % 3 * 2 + 1  # 1, 3 and 5 only
        expected = layer.reference()
        for tensor in (layer.w1, layer.w2, layer.options["w1_bias"], layer.options["w2_bias"]):
            tensor[::2] = torch.nan
            tensor[7] = torch.nan
        assert_close(layer.run(kernel=family), expected, f"{layer} {family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_dropped_slots_do_not_matter(family):
    """A slot without an expert adds nothing, whatever its routing weight is."""
    layer = make_layer(21, 40, 24, 6, 3, routing="dropped")
    expected = layer.reference()
    layer.topk_weights[(layer.topk_ids < 0) | (layer.topk_ids >= 6)] = torch.nan
    assert_close(layer.run(kernel=family), expected, f"{layer} {family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_stays_in_its_token(family):
    """One bad token spoils its own row and no other, even in a tile that it shares."""
    layer = make_layer(21, 40, 24, 2, 1)
    clean = layer.run(kernel=family)
    layer.hidden_states[4] = torch.nan
    out = layer.run(kernel=family)
    assert torch.isnan(out[4]).all()
    others = torch.arange(21) != 4
    assert torch.equal(out[others], clean[others])


def test_scratch_of_earlier_calls():
    """The pool's buffers come back full of NaN and of other shapes' values; results do not change."""
    shapes = [(1, 64, 48), (40, 33, 65), (7, 130, 20), (90, 16, 136), (20, 65, 7), (3, 8, 200)]
    layers = [make_layer(t, h, i, 6, 2, torch.bfloat16, shared=1, shared_intermediate=i + 9) for t, h, i in shapes]
    poison = [make_layer(t, h, i, 6, 2, torch.bfloat16, shared=1) for t, h, i in shapes + [(129, 140, 210)]]
    for layer in poison:
        layer.hidden_states.fill_(torch.nan)
    expected = [layer.reference() for layer in layers]
    for bad in poison:
        assert torch.isnan(bad.run()).all()
        for layer, want in zip(layers, expected, strict=True):
            assert_close(layer.run(), want, layer)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("experts", "top_k", "gap"), [(5, 2, 3), (64, 6, 1), (65, 8, 7)])
def test_routing(use_engine, engine, experts, top_k, gap):
    use_engine(engine)
    logits = torch.randn(9, experts, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(2)) * 0.1
    expected = metal_moe.fused_topk(logits, top_k, scoring="sigmoid", correction_bias=bias)
    # +inf would be chosen first.
    for poison in (torch.nan, torch.inf):
        guarded = Guarded()
        got = metal_moe.fused_topk(
            guarded.place(logits, poison, row_gap=gap),
            top_k,
            scoring="sigmoid",
            correction_bias=guarded.place(bias.view(1, -1), poison).view(-1),
        )
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        guarded.check()


@pytest.mark.parametrize("engine", ENGINES)
def test_grouping(use_engine, engine):
    use_engine(engine)
    ids = torch.randint(0, 6, (19, 3), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    expected = metal_moe.group_tokens(ids, 6, capacity=8)
    guarded = Guarded()
    got = metal_moe.group_tokens(guarded.place(ids, poison=2, row_gap=5), 6, capacity=8)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    guarded.check()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(use_engine, engine, dtype):
    use_engine(engine)
    guarded = Guarded()
    weights = guarded.place(torch.randn(5, 7, 3).to(DTYPES[dtype]))
    ids = guarded.place(torch.tensor([[4], [0], [2]]), poison=1, row_gap=2)[:, 0]
    assert torch.equal(metal_moe.gather_experts(weights, ids), weights[[4, 0, 2]])
    guarded.check()
