"""The `exact` engine: the same kernels with 32-wide simdgroups, every thread on its own, in any order.

Under `exact` the threads of a threadgroup and the threadgroups of a grid run in an order drawn from a seed, fresh
memory is NaN and every access is checked, so a missing barrier, a read of something never written or an access out of
bounds shows as a wrong result or an error. Shapes are small: a thread is a fiber.
"""

import itertools

import metal_moe
import numpy as np
import pytest
import reference
import torch
from cases import (
    ACTIVATIONS,
    DTYPES,
    FAMILIES,
    PRECISIONS,
    TOKEN_EDGES,
    assert_close,
    check,
    default_family,
    make_layer,
)

SEEDS = [0, 1, 2, 0xDEADBEEF]


def under_every_seed(seed_schedule, run):
    """Results of `run` under each seed; all must be bitwise the same."""
    results = []
    for seed in SEEDS:
        seed_schedule(seed)
        results.append(run())
    for seed, result in zip(SEEDS[1:], results[1:], strict=True):
        pairs = zip(results[0], result, strict=True) if isinstance(result, tuple) else [(results[0], result)]
        for first, other in pairs:
            if first is not None:
                kind = torch.int16 if first.element_size() == 2 else torch.int32
                assert torch.equal(first.view(kind), other.view(kind)), (
                    f"seed {seed} gives other bits than seed {SEEDS[0]}"
                )
    return results[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
def test_families(exact_engine, family, dtype, acc):
    for hidden, intermediate, routing in [(40, 24, "random"), (72, 40, "dropped"), (136, 72, "few"), (8, 136, "one")]:
        layer = make_layer(5, hidden, intermediate, 4, 2, DTYPES[dtype], routing=routing, use_fp32_acc=acc, shared=1)
        out = under_every_seed(exact_engine, lambda: layer.run(kernel=family))  # noqa: B023
        ran = metal_moe.last_dispatch()
        assert ran["engine"] == "exact" and ran["family"].removesuffix("_fp32acc") == family
        assert_close(out, layer.reference(), f"{layer} {family}")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "moe_simd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(exact_engine, family, dtype):
    for hidden, intermediate, tokens in [(33, 17, 3), (1, 1, 2), (67, 5, 9), (5, 67, 1), (129, 65, 6), (65, 130, 19)]:
        layer = make_layer(tokens, hidden, intermediate, 3, 2, DTYPES[dtype], bias=True)
        out = under_every_seed(exact_engine, lambda: layer.run(kernel=family))  # noqa: B023
        assert_close(out, layer.reference(), f"{layer} {family}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_activations(exact_engine, activation, tokens):
    for interleaved in (False,) if activation == "relu2" else (False, True):
        layer = make_layer(tokens, 24, 20, 3, 2, activation=activation, interleaved=interleaved, bias=True)
        out = under_every_seed(exact_engine, layer.run)
        assert_close(out, layer.reference(), layer)


@pytest.mark.parametrize("tokens", TOKEN_EDGES)
def test_token_edges(exact_engine, tokens):
    """The default family at every edge, most rows in one expert."""
    for routing in ("random", "one"):
        layer = make_layer(tokens, 16, 8, 2, 1, torch.float16, routing=routing)
        check(layer)
        if tokens:
            assert metal_moe.last_dispatch()["family"].removesuffix("_fp32acc") == default_family(tokens, "exact")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
def test_exact_against_native(use_engine, family, dtype, acc):
    """Two engines, the same kernels: apart by rounding at most."""
    for tokens in (1, 4, 19):
        layer = make_layer(tokens, 48, 40, 5, 2, DTYPES[dtype], shared=1, routing="dropped", use_fp32_acc=acc)
        results, kernels = [], []
        for engine in ("native", "exact"):
            use_engine(engine)
            results.append(layer.run(kernel=family))
            assert metal_moe.last_dispatch()["engine"] == engine
            kernels.append([name for name in metal_moe.last_dispatch()["kernels"] if name != "group"])
        assert kernels[0] == kernels[1]
        assert_close(results[1], reference.to_double(results[0]), f"{layer} {family}")


@pytest.mark.parametrize(
    ("experts", "top_k", "groups"), [(4, 2, 1), (31, 4, 1), (33, 5, 1), (64, 6, 8), (130, 10, 5), (257, 16, 1)]
)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus", "topk_softmax"])
def test_routing(exact_engine, experts, top_k, groups, scoring):
    generator = torch.Generator().manual_seed(experts)
    logits = torch.rand(6, experts, generator=generator).argsort(dim=1).float() * 0.03125
    logits[2, ::3] = torch.nan
    logits[3] = 1.0
    options = {
        "scoring": scoring,
        "correction_bias": torch.rand(experts, generator=generator) * 0.01 if groups > 1 else None,
        "num_expert_group": groups,
        "topk_group": min(groups, 3),
        "group_score": "top2_sum" if groups > 1 else "max",
    }
    weights, ids = under_every_seed(exact_engine, lambda: metal_moe.fused_topk(logits, top_k, **options))
    expected = reference.route(logits, top_k, **options)
    choice = np.take_along_axis(expected.choice, ids.numpy().astype(np.int64), axis=1)
    wanted = np.take_along_axis(expected.choice, expected.ids, axis=1)
    np.testing.assert_allclose(choice, wanted, rtol=1e-6)
    np.testing.assert_allclose(weights.numpy(), expected.weights, rtol=4e-6)


@pytest.mark.parametrize("experts", [1, 5, 64, 300, 1024])
@pytest.mark.parametrize("tokens", [0, 1, 33, 130])
def test_grouping(exact_engine, experts, tokens):
    ids = torch.randint(
        -1, experts + 1, (tokens, 3), generator=torch.Generator().manual_seed(tokens), dtype=torch.int32
    )
    for row_tile, shared in [(8, 0), (16, min(1, 1024 - experts))]:
        got = under_every_seed(
            exact_engine,
            lambda: tuple(metal_moe.group_tokens(ids, experts, row_tile=row_tile, shared_experts=shared, capacity=4)),  # noqa: B023
        )
        expected = reference.group(ids, experts, row_tile=row_tile, shared=shared)
        offsets, sorted_rows, inverse, tiles, padded = got
        np.testing.assert_array_equal(offsets.numpy(), expected.offsets)
        np.testing.assert_array_equal(sorted_rows.numpy(), expected.sorted_rows)
        np.testing.assert_array_equal(inverse.numpy(), expected.inverse)
        assert [tuple(t[:3]) for t in tiles.tolist() if t[2]] == expected.tiles
        np.testing.assert_array_equal(padded.numpy(), reference.pad(expected, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(exact_engine, dtype):
    weights = torch.randn(5, 9, 7).to(DTYPES[dtype])
    ids = torch.tensor([4, 0, -1, 5, 2])
    out = under_every_seed(exact_engine, lambda: metal_moe.gather_experts(weights, ids))
    assert torch.equal(out[[0, 1, 4]], weights[[4, 0, 2]]) and torch.count_nonzero(out[2:4]) == 0


@pytest.mark.parametrize("tokens", [1, 6, 18, 34])
def test_whole_layer(exact_engine, tokens):
    layer = make_layer(tokens, 24, 16, 8, 2, torch.bfloat16, shared=1)
    logits = torch.rand(tokens, 8, generator=torch.Generator().manual_seed(1)).argsort(dim=1).float()
    options = {"scoring": "sigmoid", "correction_bias": torch.linspace(-0.2, 0.2, 8), "routed_scaling_factor": 1.8}
    out = under_every_seed(
        exact_engine,
        lambda: metal_moe.fused_moe(layer.hidden_states, layer.w1, layer.w2, logits, 2, **options, **layer.options),
    )
    routing = reference.route(logits, 2, **options)
    layer.topk_weights, layer.topk_ids = torch.from_numpy(routing.weights), torch.from_numpy(routing.ids)
    assert_close(out, layer.reference(), layer)


@pytest.mark.parametrize("family", ["moe_large_batch", "moe_simd"])
def test_every_row_tile(exact_engine, family):
    """Few rows per expert to many: the row tiles that selection can choose."""
    tiles = set()
    for tokens, experts in itertools.product((3, 12, 20, 40, 70), (1, 8)):
        layer = make_layer(tokens, 16, 16, experts, 1, torch.float16)
        check(layer, kernel=family)
        tiles.add(metal_moe.last_dispatch()["row_tile"])
    compiled = {k["row_tile"] for k in metal_moe.kernels() if k["family"] == family and k["format"] == "dense"}
    assert tiles == compiled
