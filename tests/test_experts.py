"""`fused_experts` and `fused_moe` against the float64 reference: family x dtype x accumulation x shape x routing."""

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

ROUTINGS = ["random", "few", "one", "dropped", "none"]

# (H, I): aligned, odd, one past and one short of the column tiles 64 and 128, smaller than any tile.
SHAPES = [(64, 32), (72, 136), (65, 33), (127, 129), (129, 63), (1, 1), (7, 3), (200, 1), (3, 200)]
ALIGNED = [(64, 32), (72, 136), (8, 8), (128, 64), (136, 120)]


def suffix(use_fp32_acc):
    return "_fp32acc" if use_fp32_acc else ""


@pytest.mark.parametrize("tokens", TOKEN_EDGES)
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 40), (67, 35)])
def test_default_family(tokens, dtype, acc, hidden, intermediate):
    """Selection as a user gets it, at every edge of the table."""
    for routing in ("random", "one", "dropped"):
        check(make_layer(tokens, hidden, intermediate, 8, 2, DTYPES[dtype], routing=routing, use_fp32_acc=acc))
        if tokens:
            assert metal_moe.last_dispatch()["family"].removesuffix("_fp32acc") == default_family(tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
@pytest.mark.parametrize("tokens", [t for t in TOKEN_EDGES if t])
def test_every_family_at_every_token_count(family, dtype, acc, tokens):
    for routing in ROUTINGS:
        layer = make_layer(tokens, 72, 40, 6, 2, DTYPES[dtype], routing=routing, use_fp32_acc=acc)
        check(layer, kernel=family)
        assert metal_moe.last_dispatch()["family"].removesuffix("_fp32acc") == family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
def test_ragged_shapes(family, dtype, acc):
    for hidden, intermediate in ALIGNED if family == "moe_simd" else SHAPES:
        # All of the output hangs on one sum of float16 terms, or a row is so few sums of them that it may cancel as a
        # whole: their error has nothing to average out in.
        if not acc and (intermediate == 1 < hidden or hidden < 8 < intermediate):
            continue
        for tokens in (1, 5, 19, 40):
            check(
                make_layer(tokens, hidden, intermediate, 5, 2, DTYPES[dtype], use_fp32_acc=acc, seed=1), kernel=family
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(family, dtype, acc, activation):
    forms = [False] if activation == "relu2" else [False, True]
    for interleaved, bias, tokens in itertools.product(forms, (False, True), (1, 6, 37)):
        for hidden, intermediate in [(64, 48)] if family == "moe_simd" else [(64, 48), (53, 37)]:
            layer = make_layer(
                tokens,
                hidden,
                intermediate,
                7,
                3,
                DTYPES[dtype],
                activation=activation,
                interleaved=interleaved,
                bias=bias,
                use_fp32_acc=acc,
                routing="dropped",
            )
            check(layer, kernel=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_experts(family, dtype):
    """Extra slots of every token, of their own width, weighted or not, whatever happens to the routed ids."""
    for shared, width, weighted, routing in [
        (1, None, False, "random"),
        (1, 24, True, "dropped"),
        (2, 104, False, "none"),
        (3, 56, True, "one"),
    ]:
        for tokens in (1, 4, 18, 50):
            layer = make_layer(
                tokens,
                64,
                40,
                6,
                2,
                DTYPES[dtype],
                shared=shared,
                shared_intermediate=width,
                shared_weights=weighted,
                routing=routing,
                bias=shared == 2,
            )
            check(layer, kernel=family)


@pytest.mark.parametrize("activation", ["relu2", "swiglu_clamp", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 9, 20, 40])
def test_shared_experts_with_other_activations(activation, tokens):
    check(make_layer(tokens, 61, 45, 4, 2, activation=activation, shared=2, shared_intermediate=77, bias=True))
    if activation != "relu2":
        check(make_layer(tokens, 61, 45, 4, 2, activation=activation, shared=1, interleaved=True))


@pytest.mark.parametrize("top_k", range(1, 11))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_top_k(top_k, dtype):
    for tokens in (1, 8, 21, 40):
        check(make_layer(tokens, 40, 24, 16, top_k, DTYPES[dtype]))
        check(make_layer(tokens, 40, 24, 10, top_k, DTYPES[dtype], routing="one"))


@pytest.mark.parametrize("experts", [1, 2, 3, 7, 8, 31, 32, 33, 64, 65, 128, 256, 511, 512])
def test_every_expert_count(experts):
    for tokens in (1, 8, 21, 70):
        check(make_layer(tokens, 24, 16, experts, min(4, experts), torch.bfloat16))
        check(make_layer(tokens, 17, 9, experts, min(4, experts), torch.float32, shared=1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "acc"), PRECISIONS)
def test_long_sums(family, dtype, acc):
    """With float32 accumulation the error does not grow with the length of the sums."""
    check(make_layer(3, 2048, 1536, 2, 2, DTYPES[dtype], use_fp32_acc=acc), kernel=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exponent", [12, -16])
def test_bf16_keeps_its_range(family, exponent):
    """Activations and intermediates far outside what float16 can hold: bf16 is never narrowed to it."""
    layer = make_layer(9, 64, 40, 4, 2, torch.bfloat16)
    layer.w1.mul_(2.0**exponent)
    # silu(gate) * up goes with the square of w1; w2 brings the output back to the size of x.
    layer.w2.mul_(2.0 ** (-2 * exponent))
    check(layer, kernel=family)


@pytest.mark.parametrize("weights_dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 7, 20, 40])
def test_types_and_strides_of_the_routing(weights_dtype, ids_dtype, tokens):
    layer = make_layer(tokens, 48, 40, 8, 3, torch.bfloat16, shared=2, shared_weights=True, routing="dropped")
    weights, ids = layer.topk_weights.to(DTYPES[weights_dtype]), layer.topk_ids.to(ids_dtype)
    shared_weights = layer.options["shared_weights"].to(DTYPES[weights_dtype])
    layer.topk_weights, layer.topk_ids, layer.options["shared_weights"] = weights, ids, shared_weights
    expected = check(layer)
    for stretch in (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], dim=2).view(tokens, -1)[:, ::2]):
        layer.topk_weights, layer.topk_ids = stretch(weights), stretch(ids)
        layer.options["shared_weights"] = stretch(shared_weights)
        assert torch.equal(layer.run(), expected)


@pytest.mark.parametrize("tokens", [1, 7, 20, 40])
def test_ids_of_64_bits_are_not_truncated(tokens):
    layer = make_layer(tokens, 32, 24, 4, 2)
    layer.topk_ids = layer.topk_ids.long()
    layer.topk_ids[:, 0] += 2**32
    check(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 20, 40])
def test_row_stride_of_hidden_states(dtype, tokens):
    for hidden in (64, 51):
        layer = make_layer(tokens, hidden, 40, 8, 3, DTYPES[dtype])
        expected = check(layer)
        wide = torch.randn(2 * tokens, hidden + 13).to(DTYPES[dtype])
        view = wide[::2, 5 : 5 + hidden]
        view.copy_(layer.hidden_states)
        layer.hidden_states = view
        check(layer)
        assert expected.shape == layer.run().shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_tokens(dtype):
    out = make_layer(0, 32, 24, 4, 2, DTYPES[dtype], shared=1).run()
    assert out.shape == (0, 32) and out.dtype == DTYPES[dtype]


@pytest.mark.parametrize("tokens", [1, 7, 20, 40])
def test_tokens_without_experts_are_exactly_zero(tokens):
    out = make_layer(tokens, 33, 24, 4, 2, routing="none").run()
    assert torch.count_nonzero(out) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_beyond_32_bit_offsets(family):
    """More than 2^31 weights: only the experts in use are ever touched, here and in the kernels."""
    experts, hidden, intermediate = 1024, 2104, 512
    used = [0, 511, 1022, 1023]
    small = make_layer(6, hidden, intermediate, len(used), 2, torch.bfloat16)
    w1 = torch.empty(experts, 2 * intermediate, hidden, dtype=torch.bfloat16)
    w2 = torch.empty(experts, hidden, intermediate, dtype=torch.bfloat16)
    assert w1.numel() > 2**31
    w1[used], w2[used] = small.w1, small.w2
    ids = torch.tensor(used)[small.topk_ids.long()]
    out = metal_moe.fused_experts(small.hidden_states, w1, w2, small.topk_weights, ids, kernel=family)
    assert_close(out, small.reference(), family)


ROUTERS = {
    "softmax": {"scoring": "softmax"},
    "softmax_plain": {"scoring": "softmax", "renormalize": False},
    "deepseek_v3": {
        "scoring": "sigmoid",
        "num_expert_group": 4,
        "topk_group": 2,
        "group_score": "top2_sum",
        "routed_scaling_factor": 2.5,
        "correction_bias": True,
    },
    "deepseek_v4": {"scoring": "sqrt_softplus", "routed_scaling_factor": 1.5, "correction_bias": True},
    "gpt_oss": {"scoring": "topk_softmax"},
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKEN_EDGES)
def test_fused_moe(tokens, router, dtype):
    """The whole layer: the reference routes for itself."""
    layer = make_layer(tokens, 56, 40, 16, 4, DTYPES[dtype], shared=1)
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.rand(tokens, 16, generator=generator).argsort(dim=1).float().mul(0.25).sub(2).to(DTYPES[dtype])
    options = dict(ROUTERS[router])
    if options.get("correction_bias"):
        options["correction_bias"] = torch.rand(16, generator=generator).mul(0.01)
    routing = reference.route(logits, 4, **options)
    layer.topk_weights, layer.topk_ids = torch.from_numpy(routing.weights), torch.from_numpy(routing.ids)
    expected = layer.reference()
    for family in (None, *FAMILIES):
        out = metal_moe.fused_moe(
            layer.hidden_states, layer.w1, layer.w2, logits, 4, **options, **layer.options, kernel=family
        )
        assert_close(out, expected, f"{router} {layer} {family}")
        assert out.dtype == DTYPES[dtype]


@pytest.mark.parametrize("tokens", [1, 7, 20, 40])
def test_fused_moe_is_its_parts(tokens):
    """One command buffer or two calls: the same kernels, the same bits."""
    layer = make_layer(tokens, 56, 40, 16, 4, torch.bfloat16, shared=1)
    logits = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(3))
    options = {"scoring": "sigmoid", "routed_scaling_factor": 1.8, "correction_bias": torch.linspace(-0.1, 0.1, 16)}
    whole = metal_moe.fused_moe(layer.hidden_states, layer.w1, layer.w2, logits, 4, **options, **layer.options)
    layer.topk_weights, layer.topk_ids = metal_moe.fused_topk(logits, 4, **options)
    assert torch.equal(whole, layer.run())


def test_identity_experts():
    """With relu^2 and w1 = I, w2 = I: out = sum of weights * max(x, 0)^2, exactly representable."""
    hidden = 16
    x = torch.arange(-8.0, 8.0).repeat(5, 1)
    eye = torch.eye(hidden).repeat(3, 1, 1)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [-1, 1], [3, 9]])
    weights = torch.tensor([[0.5, 0.25]] * 5)
    for tokens in (1, 5):
        out = metal_moe.fused_experts(x[:tokens], eye, eye, weights[:tokens], ids[:tokens], activation="relu2")
        total = (weights * ((ids >= 0) & (ids < 3))).sum(dim=1, keepdim=True)[:tokens]
        assert torch.equal(out, total * x[:tokens].clamp(min=0).square())


def test_reference_tells_a_wrong_result():
    """The comparison used everywhere rejects one wrong element in one row."""
    layer = make_layer(9, 64, 40, 4, 2)
    expected = layer.reference()
    out = layer.run()
    out[5, 17] += 1e-3 * float(np.linalg.norm(expected[5]))
    with pytest.raises(AssertionError, match="row 5"):
        assert_close(out, expected)
    out[5, 17] = torch.nan
    with pytest.raises(AssertionError, match="row 5"):
        assert_close(out, expected)
