"""Trellis weights in every family, and layers whose gate and up, or down, alone are trellis: against float64."""

import math

import metal_moe
import pytest
import torch
from cases import DTYPES, ENGINES, FAMILIES, Layer, assert_close, make_layer
from metal_moe.formats import QuantizedExperts
from test_quantized import check
from test_trellis_kernels import CODES
from test_trellis_layer import MIXES, experts, pair

# Tokens beyond a row tile of each family; decode takes one after the other.
TOKENS = {"moe_decode": 3, "moe_prefill4": 7, "moe_base": 20, "moe_large_batch": 40, "moe_simd": 20}
PRODUCTS = {"moe_prefill4": "m4", "moe_base": "m8", "moe_large_batch": "m16", "moe_simd": "m8"}
# Where all weights are trellis and experts have so many rows in the mean, large_batch has m64.
MANY_ROWS = {"cuda": 20, "exact": 24}
AFFINE = {"format": "affine", "bits": 4, "group_size": 32}
OTHERS = {
    "dense": None,
    "affine": AFFINE,
    "mxfp4": {"format": "mxfp4"},
    "dense-part": {"format": "dense"},
    "mixed": {"bits": [2, 3, 8], "group_size": 32},
}


def trellis_w1(layer: Layer, mix: str = "6_2_3") -> QuantizedExperts:
    count, rows, hidden = layer.w1.shape
    gated = layer.options["activation"] != "relu2"
    sides = range(2 if gated else 1)
    rows = rows // len(sides)
    return pair([experts(rows, hidden, MIXES[mix][side], 10 * side, count) for side in sides])


def trellis_w2(layer: Layer, mix: str = "6_2_3") -> QuantizedExperts:
    count, hidden, intermediate = layer.w2.shape
    return experts(hidden, intermediate, MIXES[mix][2], 30, count)


def other(weights: torch.Tensor, kind: str) -> torch.Tensor | QuantizedExperts:
    return weights if OTHERS[kind] is None else QuantizedExperts.quantize(weights, **OTHERS[kind])


def in_trellis(layer: Layer, where: str, kind: str = "affine", mix: str = "6_2_3") -> tuple:
    """w1 and w2 of which "w1" or "w2" is trellis, or "both"."""
    w1 = other(layer.w1, kind) if where == "w2" else trellis_w1(layer, mix)
    w2 = other(layer.w2, kind) if where == "w1" else trellis_w2(layer, mix)
    return w1, w2


def expected_kernels(family: str, where: str, many_rows: bool) -> list[str]:
    """Those for rotated weights, and `group`, in order."""
    decode = family == "moe_decode"
    rows = "m64" if many_rows and family == "moe_large_batch" and where == "both" else PRODUCTS.get(family, "m4")
    product = f"trellis_product_{rows}"
    first = ["trellis_gate_up_decode"] if decode else ["group", "rotate_inputs", product]
    if where == "w1":
        return [*first, "unrotate_activations"]
    if where == "w2":
        return ["group", "rotate_intermediate", product, "rotate_outputs"]
    if decode:
        return [*first, "trellis_down_decode", "rotate_outputs"]
    return [*first, "rotate_activations", product, "rotate_outputs"]


def check_kernels(family: str, where: str, layer: Layer) -> None:
    ran = metal_moe.last_dispatch()
    mean_rows = layer.topk_ids.numel() / layer.w1.shape[0]
    assert ran["family"] == family + "_fp32acc"
    names = [kernel for kernel in ran["kernels"] if kernel.startswith(("trellis", "rotate", "unrotate", "group"))]
    assert names == expected_kernels(family, where, mean_rows >= MANY_ROWS.get(ran["engine"], math.inf))
    stage = {"w1": "down", "w2": "gate_up"}.get(where)
    others = [kernel for kernel in ran["kernels"] if kernel.startswith(("gate_up", "down"))]
    assert len(others) == (where != "both") and all(kernel.startswith(stage) for kernel in others)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["both", "w1", "w2"])
def test_every_family(use_engine, engine, family, where):
    use_engine(engine)
    # The exact engine takes a thousand times as long.
    for dtype in [torch.float32] if engine == "exact" else DTYPES.values():
        layer = make_layer(TOKENS[family], 128, 256, 3, 2, dtype, bias=True, routing="dropped")
        check(layer, *in_trellis(layer, where, mix="experts_differ"), kernel=family)
        check_kernels(family, where, layer)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_code_in_every_family(use_engine, engine, family):
    """Each rate with each codebook that it has, an expert each, of which every token uses three."""
    use_engine(engine)
    for first in range(0, len(CODES), 3):
        codes = (CODES + CODES[:3])[first : first + 3]
        layer = make_layer(TOKENS[family] // 2 + 1, 128, 128, 3, 3, torch.float32)
        w1 = pair([experts(128, 128, codes, first + side, 3) for side in (1, 2)])
        check(layer, w1, experts(128, 128, codes, first, 3), kernel=family)
        check_kernels(family, "both", layer)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["both", "w1", "w2"])
def test_one_token_in_every_family(use_engine, engine, where):
    use_engine(engine)
    for family in FAMILIES:
        layer = make_layer(1, 128, 128, 3, 2, torch.float32)
        check(layer, *in_trellis(layer, where), kernel=family)
        check_kernels(family, where, layer)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["w1", "w2"])
@pytest.mark.parametrize("kind", OTHERS)
def test_beside_every_kind_of_weights(use_engine, engine, where, kind):
    use_engine(engine)
    for tokens in (1, 5):
        layer = make_layer(tokens, 128, 128, 3, 2, torch.float32, bias=True)
        check(layer, *in_trellis(layer, where, kind))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["w1", "w2"])
def test_sizes_that_were_rounded_up(use_engine, engine, where):
    """H and I that are no multiples of 128 in trellis weights; dense ones beside them need no multiple of anything."""
    use_engine(engine)
    for family in FAMILIES:
        for kind, hidden, intermediate in (("affine", 160, 224), ("dense", 203, 77)):
            layer = make_layer(TOKENS[family], hidden, intermediate, 3, 2, torch.float32)
            check(layer, *in_trellis(layer, where, kind), kernel=None if family == "moe_simd" else family)


@pytest.mark.parametrize("where", ["both", "w1", "w2"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "swiglu_clamp"])
def test_activations(where, activation):
    for family in FAMILIES:
        layer = make_layer(TOKENS[family], 128, 96, 3, 2, torch.float32, activation=activation, bias=True)
        check(layer, *in_trellis(layer, where), kernel=family)


def test_interleaved_rows_before_trellis():
    layer = make_layer(5, 128, 96, 3, 2, torch.float32, activation="swiglu_clamp", interleaved=True, bias=True)
    for kind in ("dense", "affine"):
        check(layer, *in_trellis(layer, "w2", kind))


@pytest.mark.parametrize("where", ["w1", "w2"])
def test_inputs_in_slices(where, exact_engine):
    """More of them than one threadgroup of a GPU should take."""
    exact_engine(1)
    layer = make_layer(1, 2304, 128, 2, 1, torch.float32)
    check(layer, *in_trellis(layer, where))


@pytest.mark.parametrize("where", ["both", "w1", "w2"])
def test_any_order_of_threads_gives_the_same(where, exact_engine):
    layer = make_layer(18, 128, 128, 3, 2, torch.float16, routing="dropped")
    w1, w2 = in_trellis(layer, where)
    for family in ("moe_decode", "moe_base", "moe_large_batch"):
        results = []
        for seed in (1, 2, 3):
            exact_engine(seed)
            results.append(check(layer, w1, w2, kernel=family))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("engine", ENGINES)
def test_gate_6_up_2_down_3_but_for_expert_7(use_engine, engine):
    """Rates and codebooks by expert, trellis alone and with down of another format, in as many dispatches as ever."""
    use_engine(engine)

    def mixed(rows: int, columns: int, bits: float, other_bits: float, seed: int) -> QuantizedExperts:
        return experts(rows, columns, [(bits, "mul1")] * 7 + [(other_bits, "mcg")] + [(bits, "mul1")], seed, 9)

    for family in ("moe_decode", "moe_prefill4", "moe_large_batch"):
        layer = make_layer(TOKENS[family] + 4, 128, 128, 9, 3, torch.float32)
        assert (layer.topk_ids == 7).any()
        w1 = pair([mixed(128, 128, 6, 8, 1), mixed(128, 128, 2, 5, 21)])
        w2 = mixed(128, 128, 3, 4, 41)
        assert [part.settings[7].bits for part in (*w1.gate_up(), w2.parts["weight"])] == [8, 5, 4]
        check(layer, w1, w2, kernel=family)
        check_kernels(family, "both", layer)
        down = QuantizedExperts.quantize(layer.w2, bits=[3] * 7 + [4] + [3], group_size=32)
        check(layer, w1, down, kernel=family)
        check_kernels(family, "w1", layer)


def test_shared_experts_beside_mixed_layers():
    """They run after the routed ones, in the family that is asked for; they may be mixed themselves."""
    layer = make_layer(6, 128, 128, 3, 2, torch.float32, shared=1)
    shared = Layer(layer.hidden_states, layer.options["shared_w1"], layer.options["shared_w2"], None, None)
    shared.options = {"activation": "silu"}
    w1, w2 = in_trellis(layer, "w1")
    layer.options["shared_w1"], layer.options["shared_w2"] = in_trellis(shared, "w2")
    for kernel in ("moe_base", "moe_mixed_swiglu_fp32acc_6_2_4"):
        check(layer, w1, w2, kernel=kernel)
        assert metal_moe.last_dispatch()["family"] == "moe_base_fp32acc"


def test_routing_in_the_same_call():
    layer = make_layer(4, 128, 128, 3, 2, torch.float16)
    w1, w2 = in_trellis(layer, "w1")
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))
    got = metal_moe.fused_moe(layer.hidden_states, w1, w2, logits, 2)
    assert metal_moe.last_dispatch()["kernels"][:2] == ["route", "group"]
    expected = metal_moe.fused_experts(layer.hidden_states, w1, w2, *metal_moe.fused_topk(logits, 2))
    assert torch.equal(got, expected)


def test_no_tokens():
    layer = make_layer(0, 128, 128, 3, 2, torch.float32)
    for where in ("both", "w1", "w2"):
        assert check(layer, *in_trellis(layer, where)).shape == (0, 128)


def test_several_calls_alike():
    """What is remembered of a layer's shape is that of its kinds of weights."""
    layer = make_layer(5, 128, 128, 3, 2, torch.float32)
    for _ in range(2):
        for where in ("w1", "both", "w2", "both", "w1"):
            check(layer, *in_trellis(layer, where))


def test_what_stays_apart():
    """Experts of one product, and its gate and up, are all trellis or none of them is."""
    layer = make_layer(2, 128, 128, 3, 2, torch.float32)
    arguments = (layer.topk_weights, layer.topk_ids)
    affine, trellis = QuantizedExperts.quantize(layer.w2, **AFFINE), trellis_w2(layer)
    some = QuantizedExperts.cat(
        [
            QuantizedExperts({"weight": experts(128, 128, [(4, "mul1")], 1, 2).parts["weight"]}),
            QuantizedExperts.quantize(layer.w2[:1], **AFFINE),
        ]
    )
    with pytest.raises(ValueError, match=r"w2 is affine \(expert 2\); it must be trellis, as others of w2 are"):
        metal_moe.fused_experts(layer.hidden_states, trellis_w1(layer), some, *arguments)
    mixed_pair = pair([trellis, affine])
    with pytest.raises(ValueError, match=r"w1 is affine \(expert 0\); it must be trellis, as others of w1 are"):
        metal_moe.fused_experts(layer.hidden_states, mixed_pair, affine, *arguments)
    with pytest.raises(ValueError, match="kernel is 'moe_nothing': must be one of"):
        metal_moe.fused_experts(layer.hidden_states, trellis_w1(layer), trellis, *arguments, kernel="moe_nothing")


def test_outputs_are_rounded_once():
    """Half precision, trellis throughout: fp32 between the products, so one rounding of the result."""
    layer = make_layer(20, 128, 128, 3, 2, torch.bfloat16)
    w1, w2 = in_trellis(layer, "both")
    single = Layer(layer.hidden_states.float(), w1, w2, layer.topk_weights, layer.topk_ids, layer.options)
    for family in FAMILIES:
        got = check(layer, w1, w2, kernel=family)
        assert torch.equal(got, single.run(kernel=family).bfloat16())
        assert_close(got, single.run(kernel=family).double().numpy(), tolerance=2.0**-8)
