"""`fused_topk`: logits to ids and weights, in every scoring mode, against the float64 reference.

Weights come from float32 arithmetic: their relative error is at most 2e-6. Ids must be the reference's; only with a
correction bias two experts whose choice scores differ by less than float32 resolves may change places.
"""

import itertools

import metal_moe
import numpy as np
import pytest
import reference
import torch
from cases import DTYPES

SCORINGS = ["softmax", "sigmoid", "sqrt_softplus", "topk_softmax"]
WEIGHT_TOLERANCE = 2e-6
# Of the row's largest choice score: what float32 can tell apart after exp, log and a division.
CHOICE_RESOLUTION = 1e-6


def check_routing(logits, top_k, **options):
    weights, ids = metal_moe.fused_topk(logits, top_k, **options)
    expected = reference.route(logits, top_k, **options)
    tokens, experts = logits.shape
    biasless = options.get("correction_bias") is None
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert weights.shape == ids.shape == (tokens, top_k)
    about = f"T={tokens} E={experts} k={top_k} {logits.dtype} {options}"
    got_ids = ids.numpy().astype(np.int64)
    assert ((got_ids >= 0) & (got_ids < experts)).all(), about
    for token in range(tokens):
        assert len(set(got_ids[token])) == top_k, f"an expert twice in token {token}: {got_ids[token]}; {about}"
        mine, wanted = expected.choice[token][got_ids[token]], expected.choice[token][expected.ids[token]]
        finite = np.abs(wanted[np.isfinite(wanted)])
        slack = 0.0 if biasless else CHOICE_RESOLUTION * finite.max()
        swapped = got_ids[token] != expected.ids[token]
        with np.errstate(invalid="ignore"):
            assert (np.abs(mine - wanted)[swapped] <= slack).all() and not (biasless and swapped.any()), (
                f"token {token}: ids {got_ids[token]}, expected {expected.ids[token]}, choice {mine}, {wanted}; {about}"
            )
    where = (got_ids == expected.ids).all(axis=1)
    got, want = reference.to_double(weights)[where], expected.weights[where]
    assert where.mean() > 0.9 if tokens else True, f"too many rows within rounding of a tie; {about}"
    error = np.abs(got - want) / np.maximum(np.abs(want), np.finfo(np.float32).tiny)
    assert (error <= WEIGHT_TOLERANCE).all(), f"weights off by {error.max():.2e}; {about}"
    return weights, ids


def make_logits(tokens, experts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed * 7919 + tokens * 31 + experts)
    return (torch.randn(tokens, experts, generator=generator) * 2).to(dtype)


def distinct_logits(tokens, experts, dtype=torch.float32, seed=0):
    """Every row a random order of values that are far enough apart for any dtype: ids must match exactly."""
    generator = torch.Generator().manual_seed(seed * 7919 + tokens * 31 + experts)
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    return (order.float() * 0.0625 - experts / 32).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(
    ("experts", "top_k"),
    [
        (1, 1),
        (2, 1),
        (3, 2),
        (8, 2),
        (31, 4),
        (32, 4),
        (33, 5),
        (64, 6),
        (65, 8),
        (128, 8),
        (255, 10),
        (512, 10),
        (1024, 16),
    ],
)
def test_sizes(experts, top_k, scoring, dtype):
    logits = make_logits(33, experts) if dtype == "fp32" else distinct_logits(33, min(experts, 64), DTYPES[dtype])
    check_routing(logits, min(top_k, logits.shape[1]), scoring=scoring)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 129])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_tokens(tokens, scoring):
    check_routing(make_logits(tokens, 64), 4, scoring=scoring)


@pytest.mark.parametrize("top_k", range(1, 17))
@pytest.mark.parametrize("experts", [16, 48])
def test_every_top_k(experts, top_k):
    for scoring in SCORINGS:
        check_routing(make_logits(9, experts), top_k, scoring=scoring)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.8, 2.5])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_renormalize_and_scale(scoring, renormalize, scale):
    weights, _ = check_routing(
        make_logits(17, 64), 4, scoring=scoring, renormalize=renormalize, routed_scaling_factor=scale
    )
    total = weights.double().sum(dim=1)
    if renormalize or scoring == "topk_softmax":
        assert torch.allclose(total, torch.full_like(total, scale), rtol=1e-6, atol=0)
    else:
        assert (total != scale).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
def test_renormalize_epsilon_guards_weights_that_vanish(scoring):
    """Scores that underflow to nothing give zero weights, not NaN."""
    logits = torch.full((3, 8), -200.0)
    logits[:, 0] = torch.tensor([-200.0, -150.0, 0.0])
    weights, _ = metal_moe.fused_topk(logits, 2, scoring=scoring, renormalize_epsilon=1e-20)
    assert torch.isfinite(weights).all()
    logits = torch.tensor([[0.0, -0.5, 1.0, 0.25]])
    check_routing(logits, 2, scoring=scoring, renormalize_epsilon=0.125)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_bias_is_for_the_choice_only(scoring, bias_dtype):
    logits = make_logits(33, 48)
    bias = make_logits(1, 48, DTYPES[bias_dtype], seed=5)[0] * 0.5
    _, ids = check_routing(logits, 4, scoring=scoring, correction_bias=bias)
    _, without = check_routing(logits, 4, scoring=scoring)
    assert not torch.equal(ids, without)


GROUPS = [
    (64, 4, 8, 3),
    (64, 6, 8, 4),
    (256, 8, 8, 4),
    (160, 6, 8, 3),
    (12, 2, 6, 1),
    (12, 2, 12, 5),
    (30, 3, 5, 5),
    (96, 4, 3, 1),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "chosen", "score"),
    [
        (*shape, score)
        for shape, score in itertools.product(GROUPS, ["max", "top2_sum"])
        if score == "max" or shape[0] > shape[2]
    ],
)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
def test_group_limited(experts, top_k, groups, chosen, score, scoring, with_bias):
    bias = make_logits(1, experts, seed=3)[0] * 0.1 if with_bias else None
    _, ids = check_routing(
        make_logits(33, experts),
        top_k,
        scoring=scoring,
        correction_bias=bias,
        num_expert_group=groups,
        topk_group=chosen,
        group_score=score,
    )
    size = experts // groups
    assert all(len({expert // size for expert in row}) <= chosen for row in ids.tolist())


def test_negative_choice_scores_stay_within_the_chosen_groups():
    """A bias that makes every choice score negative must not let an expert of another group in as 'zero'."""
    bias = torch.full((16,), -5.0)
    _, ids = check_routing(
        make_logits(20, 16),
        4,
        scoring="sigmoid",
        correction_bias=bias,
        num_expert_group=4,
        topk_group=1,
        group_score="top2_sum",
    )
    assert all(len({expert // 4 for expert in row}) == 1 for row in ids.tolist())


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("experts", [8, 33, 64, 200])
def test_ties_go_to_the_lower_id(scoring, experts):
    logits = torch.zeros(5, experts)
    _, ids = metal_moe.fused_topk(logits, 6, scoring=scoring)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 5
    # Two levels, in an order that is neither ascending nor descending.
    logits[:, 3::4] = 1.5
    _, ids = check_routing(logits, 6, scoring=scoring)
    assert ids.tolist() == reference.route(logits, 6, scoring=scoring).ids.tolist()


@pytest.mark.parametrize("score", ["max", "top2_sum"])
def test_tied_groups_go_to_the_lower_group(score):
    _, ids = metal_moe.fused_topk(
        torch.zeros(3, 24), 4, scoring="sigmoid", num_expert_group=6, topk_group=2, group_score=score
    )
    assert ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("experts", [8, 65])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_nan_logits_rank_last_and_weigh_nothing(scoring, experts):
    logits = distinct_logits(9, experts)
    logits[0, 2] = torch.nan
    logits[1] = torch.nan
    logits[2, : experts - 2] = torch.nan  # fewer numbers than experts to choose
    logits[3, 0], logits[3, -1] = torch.nan, torch.nan
    weights, ids = check_routing(logits, 4, scoring=scoring)
    expected = reference.route(logits, 4, scoring=scoring)
    assert ids.tolist() == expected.ids.tolist()
    assert torch.isfinite(weights).all()
    assert ids[1].tolist() == [0, 1, 2, 3] and (weights[1] == 0).all()
    assert ids[2, 2:].tolist() == [0, 1] and (weights[2, 2:] == 0).all()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_nan_logits_with_bias_and_groups(scoring):
    logits = distinct_logits(9, 32)
    logits[0, ::2] = torch.nan
    logits[1, :8] = torch.nan
    bias = distinct_logits(1, 32, seed=4)[0]
    weights, _ = check_routing(
        logits, 4, scoring=scoring, correction_bias=bias, num_expert_group=4, topk_group=2, group_score="top2_sum"
    )
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_large_logits_do_not_overflow(scoring):
    logits = torch.tensor([[1e4, -1e4, 9999.0, 0.0], [-1e4, -1.0001e4, -1.1e4, -2e4], [80.0, 90.0, 100.0, -100.0]])
    weights, ids = check_routing(logits, 2, scoring=scoring, renormalize=False)
    assert torch.isfinite(weights).all()
    assert ids[0, 0] == 0


@pytest.mark.parametrize("scoring", SCORINGS)
def test_strided_logits(scoring):
    base = make_logits(40, 96)
    for logits in (base[::2], base[:, 3:67], base[:, ::3], base.t().contiguous().t(), base[5:9, 7:20]):
        check_routing(logits, 4, scoring=scoring)


def test_each_token_stands_alone():
    """A token's routing does not depend on the tokens beside it."""
    logits = make_logits(37, 64)
    weights, ids = metal_moe.fused_topk(logits, 6, scoring="sigmoid")
    for token in range(37):
        alone = metal_moe.fused_topk(logits[token : token + 1], 6, scoring="sigmoid")
        assert torch.equal(alone[0][0], weights[token]) and torch.equal(alone[1][0], ids[token])
