"""Hypothesis: whatever the shape, the claims hold."""

import metal_moe
import numpy as np
import reference
import torch
from cases import ACTIVATIONS, DTYPES, FAMILIES, assert_close, make_layer
from hypothesis import given, settings
from hypothesis import strategies as st

# Not so small that the terms of a whole row may cancel: relative errors would mean nothing.
sizes = st.one_of(st.integers(16, 40), st.sampled_from([63, 64, 65, 96, 127, 128, 129, 160]))
token_counts = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 100]))


@st.composite
def layers(draw, **fixed):
    precision = draw(st.sampled_from([("fp32", True), ("fp16", True), ("bf16", True)]))
    experts = draw(st.integers(1, 20))
    activation = draw(st.sampled_from(ACTIVATIONS))
    options = {
        "activation": activation,
        "interleaved": activation != "relu2" and draw(st.booleans()),
        "bias": draw(st.booleans()),
        "shared": draw(st.integers(0, 2)),
        "shared_intermediate": draw(st.none() | sizes),
        "shared_weights": draw(st.booleans()),
        "routing": draw(st.sampled_from(["random", "few", "one", "dropped"])),
        "seed": draw(st.integers(0, 1000)),
        "use_fp32_acc": precision[1],
    }
    return make_layer(
        draw(token_counts),
        draw(sizes),
        draw(sizes),
        experts,
        draw(st.integers(1, min(10, experts))),
        DTYPES[precision[0]],
        **{**options, **fixed},
    )


@settings(max_examples=300)
@given(layers())
def test_fused_experts_is_the_reference(layer):
    assert_close(layer.run(), layer.reference(), layer)


@settings(max_examples=200)
@given(layers(), st.sampled_from([f for f in FAMILIES if f != "moe_simd"]))
def test_every_family_is_the_reference(layer, family):
    assert_close(layer.run(kernel=family), layer.reference(), f"{layer} {family}")


@given(layers(shared=0))
def test_weights_scale_the_output(layer):
    """Doubling every routing weight doubles the output exactly: a power of two rounds nothing."""
    once = layer.run()
    layer.topk_weights = layer.topk_weights * 2
    twice = layer.run()
    normal = once.abs() > 4 * torch.finfo(once.dtype).tiny
    assert torch.equal(twice[normal], (once * 2)[normal])


@given(layers(shared=0, routing="random"), st.randoms(use_true_random=False))
def test_renaming_experts_changes_nothing(layer, random):
    """Experts in another order, ids renamed to match: the same sum in the same slot order, the same bits."""
    before = layer.run()
    experts = layer.w1.shape[0]
    order = list(range(experts))
    random.shuffle(order)
    place = torch.empty(experts, dtype=torch.int32)
    place[order] = torch.arange(experts, dtype=torch.int32)
    layer.topk_ids = place[layer.topk_ids.long()]
    layer.w1, layer.w2 = layer.w1[order].contiguous(), layer.w2[order].contiguous()
    for name in ("w1_bias", "w2_bias"):
        if name in layer.options:
            layer.options[name] = layer.options[name][order].contiguous()
    assert torch.equal(layer.run(), before)


@given(layers(shared=0))
def test_dropping_a_slot_is_weighting_it_zero(layer):
    layer.topk_weights[:, 0] = 0
    weighted = layer.run()
    layer.topk_ids[:, 0] = -1
    assert torch.equal(layer.run(), weighted)


@settings(max_examples=150)
@given(
    tokens=token_counts,
    top_k=st.integers(1, 10),
    experts=st.integers(1, 200),
    shared=st.integers(0, 3),
    row_tile=st.integers(1, 40),
    stray=st.integers(0, 3),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_group_tokens(tokens, top_k, experts, shared, row_tile, stray, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-stray, experts + stray, (tokens, top_k), generator=generator)
    ids = ids if wide else ids.int()
    got = metal_moe.group_tokens(ids, experts, row_tile=row_tile, shared_experts=shared)
    offsets, rows, inverse = got.offsets.numpy(), got.sorted_rows.numpy(), got.inverse.numpy()
    slots = top_k + shared
    kept = offsets[-1]
    # Offsets count; places and assignments are each other's inverse; every place belongs to its expert, in order.
    assert offsets[0] == 0 and (np.diff(offsets) >= 0).all() and len(offsets) == experts + shared + 1
    assert (rows[kept:] == -1).all() and sorted(rows[:kept]) == sorted(np.flatnonzero(inverse >= 0))
    assert (inverse[rows[:kept]] == np.arange(kept)).all()
    for expert in range(experts + shared):
        mine = rows[offsets[expert] : offsets[expert + 1]]
        assert (np.diff(mine) > 0).all()
        token, slot = mine // slots, mine % slots
        if expert < experts:
            assert (ids.numpy()[token, slot] == expert).all()
        else:
            assert (slot == top_k + expert - experts).all() and len(mine) == tokens
    # Tiles cover every place once, in order, without crossing an expert.
    tiles = got.tiles.numpy()
    tiles = tiles[tiles[:, 2] != 0]
    place = 0
    for expert, first, count in tiles[:, :3]:
        assert first == place and 0 < count <= row_tile
        assert offsets[expert] <= first and first + count <= offsets[expert + 1]
        place += count
    assert place == kept
    np.testing.assert_array_equal(rows, reference.group(ids, experts, row_tile=row_tile, shared=shared).sorted_rows)


@settings(max_examples=150)
@given(
    tokens=token_counts,
    groups=st.integers(1, 8),
    per_group=st.integers(2, 20),
    data=st.data(),
    scoring=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus", "topk_softmax"]),
    score=st.sampled_from(["max", "top2_sum"]),
    renormalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_fused_topk(tokens, groups, per_group, data, scoring, score, renormalize, scale, levels, seed):
    """Logits from few levels, so that ties are the rule: ids are the reference's exactly."""
    chosen = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(16, chosen * per_group)))
    logits = torch.randint(0, levels, (tokens, groups * per_group), generator=torch.Generator().manual_seed(seed)) / 8
    options = {
        "scoring": scoring,
        "num_expert_group": groups,
        "topk_group": chosen,
        "group_score": score,
        "renormalize": renormalize,
        "routed_scaling_factor": scale,
    }
    weights, ids = metal_moe.fused_topk(logits, top_k, **options)
    expected = reference.route(logits, top_k, **options)
    np.testing.assert_array_equal(ids.numpy(), expected.ids)
    np.testing.assert_allclose(weights.numpy(), expected.weights, rtol=2e-6)
    assert (weights.diff(dim=1) <= 0).all()


@settings(max_examples=100)
@given(
    count=st.integers(0, 20),
    experts=st.integers(1, 9),
    shape=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 1000),
)
def test_gather_experts(count, experts, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(experts, *shape, generator=generator).to(dtype)
    ids = torch.randint(0, experts, (count,), generator=generator)
    assert torch.equal(metal_moe.gather_experts(weights, ids), weights[ids])
