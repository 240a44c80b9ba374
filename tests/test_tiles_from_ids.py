"""Few assignments: threadgroups find their row tiles in the ids, and `group` does not run.

On every engine the results are those of the same rows with `group`, bit for bit.
"""

import metal_moe
import pytest
import torch
from cases import (
    DTYPES,
    ENGINES,
    FAMILIES,
    FEW_ASSIGNMENTS,
    FEW_ROWS,
    PRECISIONS,
    ROUNDING,
    Layer,
    check,
    dispatches,
    make_layer,
)
from metal_moe import QuantizedExperts

GROUPED = [family for family in FAMILIES if family != "moe_decode"]
SEEDS = [0, 1, 0xDEADBEEF]


def check_dispatches(layer: Layer) -> None:
    """That the last call ran `group` where it must, and not where it need not."""
    ran = metal_moe.last_dispatch()
    tokens, top_k = layer.topk_ids.shape
    slots = top_k + (layer.options["shared_w1"].shape[0] if "shared_w1" in layer.options else 0)
    expected = dispatches(ran["engine"], ran["family"], tokens * slots, ran["row_tile"])
    assert (ran["dispatches"], "group" in ran["kernels"]) == (expected, expected == 4), ran


def with_dropped_tokens(layer: Layer, tokens: int) -> Layer:
    """The layer with more tokens, which no routed expert takes."""
    more = make_layer(tokens, layer.hidden_states.shape[1], 8, 1, layer.topk_ids.shape[1], layer.hidden_states.dtype)
    dropped = torch.full_like(more.topk_ids, -1)
    options = dict(layer.options)
    if "shared_weights" in options:
        options["shared_weights"] = torch.cat(
            [options["shared_weights"], torch.ones(tokens, layer.options["shared_w1"].shape[0])]
        )
    return Layer(
        torch.cat([layer.hidden_states, more.hidden_states]),
        layer.w1,
        layer.w2,
        torch.cat([layer.topk_weights, more.topk_weights]),
        torch.cat([layer.topk_ids, dropped]),
        options,
    )


def check_bits(layer: Layer, family: str, tolerance: float | None = None) -> None:
    """Right, and the same bits in a batch that `group` runs for."""
    tokens = layer.topk_ids.shape[0]
    out = check(layer, tolerance, kernel=family)
    few = metal_moe.last_dispatch()
    check_dispatches(layer)
    more = with_dropped_tokens(layer, FEW_ASSIGNMENTS // layer.topk_ids.shape[1] + 1 - tokens)
    grouped = more.run(kernel=family)
    ran = metal_moe.last_dispatch()
    assert ran["kernels"] == (["group"] if "group" not in few["kernels"] else []) + few["kernels"]
    assert ran["row_tile"] == few["row_tile"]
    kind = torch.int16 if out.element_size() == 2 else torch.int32
    assert torch.equal(out.view(kind), grouped[:tokens].view(kind)), f"{layer} {family}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
def test_same_bits_as_with_group(use_engine, engine, family, dtype, acc):
    use_engine(engine)
    for tokens, top_k, options in [
        (4, 8, {}),
        (8, 4, {"routing": "dropped", "bias": True}),
        (5, 4, {"shared": 1, "shared_intermediate": 48, "shared_weights": True}),
        (6, 3, {"shared": 2, "routing": "few", "activation": "relu2"}),
    ]:
        layer = make_layer(tokens, 40, 24, 40, top_k, DTYPES[dtype], use_fp32_acc=acc, **options)
        check_bits(layer, family)


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("seed", SEEDS)
def test_in_any_order(exact_engine, family, seed):
    """Rows that nobody computes (dropped ids) are NaN there, and read by nobody."""
    exact_engine(seed)
    layer = make_layer(5, 40, 24, 5, 5, torch.float16, routing="dropped", shared=1, bias=True)
    layer.topk_ids[1] = layer.topk_ids[1, 0]
    check_bits(layer, family)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("routing", ["random", "few", "one", "dropped", "none"])
def test_every_split_of_the_assignments(use_engine, engine, family, routing):
    """Up to the last lane and one beyond; experts of more rows than a tile; the same expert twice in a token."""
    use_engine(engine)
    for tokens, top_k, experts in [
        (1, 1, 3),
        (2, 16, 17),
        (32, 1, 2),
        (16, 2, 130),
        (1, 32, 33),
        (33, 1, 7),
        (3, 11, 11),
    ]:
        layer = make_layer(tokens, 16, 8, experts, top_k, torch.bfloat16, routing=routing)
        check(layer, kernel=family)
        check_dispatches(layer)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", GROUPED)
def test_types_and_strides(use_engine, engine, family):
    """Ids of both types, in any strides; rows of hidden states apart."""
    use_engine(engine)
    layer = make_layer(6, 24, 16, 9, 5, routing="dropped", seed=3)
    padded = torch.full((6, 32), torch.nan)
    padded[:, :24] = layer.hidden_states
    layer.hidden_states = padded[:, :24]
    for dtype in (torch.int32, torch.int64):
        ids = layer.topk_ids.to(dtype)
        if dtype == torch.int64:
            ids[0, 1] += 1 << 32  # no expert, whatever its low half says
        for stored in (ids, ids.t().contiguous().t(), torch.stack([ids, ids + 1], dim=2)[:, :, 0]):
            layer.topk_ids = stored
            check(layer, kernel=family)
            check_dispatches(layer)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", GROUPED)
def test_quantised_weights(use_engine, engine, family):
    use_engine(engine)
    layer = make_layer(4, 64, 32, 40, 4, torch.bfloat16, routing="dropped", bias=True)
    layer.w1 = QuantizedExperts.quantize(layer.w1, format="affine", bits=5, group_size=32)
    layer.w2 = QuantizedExperts.quantize(layer.w2, format="mxfp4")
    dense = Layer(
        layer.hidden_states,
        layer.w1.dequantize(torch.float64),
        layer.w2.dequantize(torch.float64),
        layer.topk_weights,
        layer.topk_ids,
        layer.options,
    )
    layer.reference = dense.reference
    check_bits(layer, family, ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("engine", ENGINES)
def test_whole_layer(use_engine, engine):
    """The ids that `route` has written are read by each of the three dispatches after it."""
    use_engine(engine)
    layer = make_layer(4, 32, 16, 16, 8, torch.bfloat16)
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    out = metal_moe.fused_moe(layer.hidden_states, layer.w1, layer.w2, logits, 8)
    ran = metal_moe.last_dispatch()
    assert ran["dispatches"] == 1 + dispatches(engine, ran["family"], 32, ran["row_tile"])
    layer.topk_weights, layer.topk_ids = metal_moe.fused_topk(logits, 8)
    assert torch.equal(out, layer.run())


@pytest.mark.parametrize("engine", ENGINES)
def test_large_row_tiles_come_from_group(use_engine, engine):
    """All rows in one expert, more than a tile that is looked for in the ids has."""
    use_engine(engine)
    layer = make_layer(FEW_ASSIGNMENTS, 16, 8, 1, 1)
    check(layer, kernel="moe_large_batch")
    ran = metal_moe.last_dispatch()
    assert ran["row_tile"] > FEW_ROWS and ran["kernels"][0] == "group"
