"""Layers with quantised weights: against float64 on what the codes say, at the rounding of the activations' type."""

import itertools

import metal_moe
import pytest
import reference
import torch
from cases import ACTIVATIONS, DEVICE, DTYPES, ENGINES, FAMILIES, ROUNDING, Layer, assert_close, dispatches, make_layer
from metal_moe import QuantizedExperts
from test_formats_trellis import exl3_linear

AFFINE = [
    {"format": "affine", "bits": bits, "group_size": group} for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)
]
FORMATS = [*AFFINE, {"format": "mxfp4"}, {"format": "mxfp8"}, {"format": "nvfp4"}, {"format": "dense"}]
TOKENS = {"moe_decode": 1, "moe_prefill4": 7, "moe_base": 9, "moe_large_batch": 20, "moe_simd": 20}
# hidden, intermediate, bits: no multiples of a stage or of what a simdgroup takes at a time, some beyond it.
SIZES = {"native": [(32, 32, 4), (96, 32, 3), (160, 96, 5), (1056, 64, 4), (64, 1088, 6)]}
SIZES["exact"] = SIZES["cuda"] = [(32, 32, 4), (96, 32, 3), (1056, 32, 4), (32, 1056, 6)]


def name_of(settings: dict) -> str:
    return "-".join(str(value) for value in settings.values())


def quantized(w: torch.Tensor, **settings) -> QuantizedExperts:
    return QuantizedExperts.quantize(w, **settings)


def reference_of(layer: Layer, w1, w2):
    """float64 on the weights that the codes stand for."""

    def dense(w):
        return w.dequantize(torch.float64) if isinstance(w, QuantizedExperts) else w

    options = {k: dense(v) for k, v in layer.options.items() if k not in ("use_fp32_acc", "kernel")}
    return reference.experts(layer.hidden_states, dense(w1), dense(w2), layer.topk_weights, layer.topk_ids, **options)


def check(layer: Layer, w1, w2, **overrides) -> torch.Tensor:
    out = Layer(layer.hidden_states, w1, w2, layer.topk_weights, layer.topk_ids, layer.options).run(**overrides)
    assert out.dtype == layer.hidden_states.dtype
    about = f"{layer.hidden_states.shape} {w1!r} {w2!r} {overrides}"
    assert_close(out, reference_of(layer, w1, w2), about, ROUNDING[out.dtype])
    return out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", FORMATS, ids=name_of)
def test_every_format_in_every_family(use_engine, engine, family, settings):
    use_engine(engine)
    for dtype in DTYPES.values():
        hidden = 256 if engine != "exact" or settings.get("group_size") == 128 else 128
        layer = make_layer(TOKENS[family], hidden, 128, 3, 2, dtype)
        check(layer, quantized(layer.w1, **settings), quantized(layer.w2, **settings), kernel=family)
        ran = metal_moe.last_dispatch()
        kernels = [kernel for kernel in ran["kernels"] if kernel.startswith(("gate_up", "down"))]
        assert len(kernels) == 2 and all("_quantized_" in kernel for kernel in kernels)
        assert ran["family"] == family + "_fp32acc"


def model(layer: Layer, w1: torch.Tensor, w2: torch.Tensor, rounds_weights: bool) -> torch.Tensor:
    """float64, but what docs/formats.md says is rounded to the activations' type: weights as the matrix families stage
    them, and what stands between the products. Not the result."""
    dtype = layer.hidden_states.dtype
    if rounds_weights:
        w1, w2 = w1.to(dtype).double(), w2.to(dtype).double()
    out = torch.zeros(layer.hidden_states.shape, dtype=torch.float64)
    for token, slot in itertools.product(*map(range, layer.topk_ids.shape)):
        expert = layer.topk_ids[token, slot]
        rows = w1[expert] @ layer.hidden_states[token].double() + layer.options["w1_bias"][expert].double()
        gate, up = rows.chunk(2)
        h = (gate * torch.sigmoid(gate) * up).to(dtype).double()
        out[token] += layer.topk_weights[token, slot].double() * (
            w2[expert] @ h + layer.options["w2_bias"][expert].double()
        )
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", FORMATS[::3], ids=name_of)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_is_rounded(family, settings, dtype):
    """16-bit results are no further from the model than one rounding of them: sums are fp32, and nothing else is
    rounded."""
    layer = make_layer(TOKENS[family], 256, 128, 3, 2, DTYPES[dtype], bias=True)
    w1, w2 = quantized(layer.w1, **settings), quantized(layer.w2, **settings)
    # NVIDIA's tensor cores take codes of 4 bits as they are.
    packed = DEVICE.type == "cuda" and w1.formats == {"affine"} and settings["bits"] == 4
    rounds_weights = family not in ("moe_decode", "moe_prefill4") and not packed
    expected = model(layer, *(w.dequantize(torch.float64) for w in (w1, w2)), rounds_weights)
    out = Layer(layer.hidden_states, w1, w2, layer.topk_weights, layer.topk_ids, layer.options).run(kernel=family)
    error, rounding = ((each.cpu().double() - expected).norm() for each in (out, expected.to(DTYPES[dtype])))
    assert error <= 1.25 * rounding


def test_every_kernel_of_quantised_weights_runs(use_engine):
    """None is listed that no layer takes: each is compared with the reference here, on the engine that has all."""
    use_engine(ENGINES[-1])
    names = {kernel["name"] for kernel in metal_moe.kernels()}
    names = {name for name in names if any(word in name for word in ("_quantized_", "trellis", "rotate"))}
    ran: set[str] = set()
    for dtype, activation, (family, tokens) in itertools.product(
        DTYPES.values(), ("silu", "relu2"), [*TOKENS.items(), ("moe_large_batch", 110)]
    ):
        layer = make_layer(tokens, 64, 64, 4, 2, dtype, activation=activation, bias=True)
        check(layer, quantized(layer.w1, bits=5, group_size=32), quantized(layer.w2, format="mxfp8"), kernel=family)
        ran |= set(metal_moe.last_dispatch()["kernels"])
    trellis = [
        QuantizedExperts.from_exl3([exl3_linear(128, 128, 2, seed=3 * side + e) for e in range(2)]) for side in range(3)
    ]
    w1 = QuantizedExperts({"gate": trellis[0].parts["weight"], "up": trellis[1].parts["weight"]})
    for (family, tokens), where in itertools.product(
        [*TOKENS.items(), ("moe_large_batch", 70)], (("w1", "w2"), ("w1",), ("w2",))
    ):
        layer = make_layer(tokens, 128, 128, 2, 2, torch.float32)
        check(layer, w1 if "w1" in where else layer.w1, trellis[2] if "w2" in where else layer.w2, kernel=family)
        ran |= set(metal_moe.last_dispatch()["kernels"])
    assert names - ran == {"dequantize_trellis"}


# native has no use for tiles of 64 rows.
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "native"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("settings", [AFFINE[9], {"bits": 3, "group_size": 32}, {"format": "nvfp4"}], ids=name_of)
def test_row_tiles_of_64(use_engine, engine, settings, activation, dtype):
    use_engine(engine)
    options = {"activation": activation, "bias": True, "routing": "dropped"}
    layer = make_layer(110, 96, 128, 2, 2, DTYPES[dtype], **options)
    check(layer, quantized(layer.w1, **settings), quantized(layer.w2, **settings), kernel="moe_large_batch")
    assert metal_moe.last_dispatch()["row_tile"] >= 32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_sizes(use_engine, engine, family):
    """Any number of columns; K in whole groups, among them such as no stage or simdgroup has room for."""
    use_engine(engine)
    for hidden, intermediate, bits in SIZES[engine]:
        layer = make_layer(TOKENS[family], hidden, intermediate, 3, 2, torch.float32, bias=True)
        w1 = quantized(layer.w1, format="affine", bits=bits, group_size=32)
        check(layer, w1, quantized(layer.w2, format="mxfp4"), kernel=family)
    # 67 columns of gate and up, and dense weights after them.
    layer = make_layer(TOKENS[family], 64, 67, 3, 2, torch.float32)
    w1 = quantized(layer.w1, format="affine", bits=4, group_size=32)
    check(layer, w1, layer.w2, kernel=family)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_bits_and_formats(use_engine, engine, family, dtype):
    """Gate, up and down of bits of their own, experts too, in the same dispatches as ever."""
    use_engine(engine)
    layer = make_layer(TOKENS[family] + 3, 128, 64, 6, 3, DTYPES[dtype], bias=True, routing="dropped")
    gate_up = {"gate": 6, "up": [2, 3, 4, 5, 6, 8]}
    w1 = quantized(layer.w1, format="affine", bits=gate_up, group_size=64)
    some = [{"format": "affine", "bits": 3, "group_size": 32}, {"format": "mxfp4"}, {"format": "nvfp4"}]
    some += [{"format": "mxfp8"}, {"format": "affine", "bits": 8}, {"format": "affine", "bits": 2, "group_size": 64}]
    w2 = QuantizedExperts.cat([quantized(layer.w2[e : e + 1], **settings) for e, settings in enumerate(some)])
    check(layer, w1, w2, kernel=family)
    ran = metal_moe.last_dispatch()
    assert ran["dispatches"] == dispatches(engine, family, layer.topk_ids.numel(), ran["row_tile"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gate_6_up_2_down_3_but_for_expert_7(use_engine, engine, family):
    use_engine(engine)
    layer = make_layer(TOKENS[family] + 4, 64, 64, 9, 3, torch.float32)
    assert (layer.topk_ids == 7).any()
    gate, up, down = ([bits] * 7 + [other] + [bits] for bits, other in ((6, 8), (2, 5), (3, 4)))
    w1 = quantized(layer.w1, bits={"gate": gate, "up": up}, group_size=32)
    w2 = quantized(layer.w2, bits=down, group_size=32)
    assert [part.settings[7].bits for part in (*w1.gate_up(), w2.parts["weight"])] == [8, 5, 4]
    check(layer, w1, w2, kernel=family)
    ran = metal_moe.last_dispatch()
    assert ran["dispatches"] == dispatches(engine, family, layer.topk_ids.numel(), ran["row_tile"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_interleaving_and_dropped_ids(use_engine, engine, family, activation):
    use_engine(engine)
    for interleaved, routing in itertools.product({False, activation != "relu2"}, ("dropped", "none", "few")):
        options = {"activation": activation, "interleaved": interleaved, "routing": routing, "bias": True}
        dtype = torch.float32 if routing == "few" else torch.bfloat16
        layer = make_layer(TOKENS[family], 64, 96, 4, 3, dtype, **options)
        w1 = quantized(layer.w1, format="mxfp4")
        check(layer, w1, quantized(layer.w2, format="affine", group_size=32), kernel=family)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_product_quantised(use_engine, engine, family):
    """w1 dense and w2 quantised, and the other way round."""
    use_engine(engine)
    layer = make_layer(TOKENS[family], 64, 64, 4, 2, torch.float16)
    check(layer, quantized(layer.w1), layer.w2, kernel=family)
    check(layer, layer.w1, quantized(layer.w2), kernel=family, use_fp32_acc=False)
    assert metal_moe.last_dispatch()["family"] == family + "_fp32acc"


AFFINE_4 = {"format": "affine", "bits": 4, "group_size": 32}
# w1, w2, shared_w1, shared_w2; None: the dense tensor.
SHARED = {
    "quantised": (AFFINE_4, {"format": "mxfp4"}, {**AFFINE_4, "bits": 8}, {"format": "nvfp4"}),
    "dense_shared": ({"bits": {"gate": 6, "up": 2}, "group_size": 32}, AFFINE_4, None, None),
    "dense_routed": (None, None, {"bits": {"gate": 3, "up": 5}, "group_size": 32}, {"format": "mxfp8"}),
    "only_w1": (AFFINE_4, None, {"format": "mxfp4"}, None),
    "only_w2": (None, {"format": "nvfp4"}, None, None),
    "crosswise": (AFFINE_4, None, None, AFFINE_4),
}


def shared_layer(kind: str, tokens: int, dtype: torch.dtype, intermediate: int = 64, **options) -> tuple:
    """A layer with two shared experts, whose intermediate size is another; its w1 and w2."""
    layer = make_layer(tokens, 96, intermediate, 4, 2, dtype, shared=2, shared_intermediate=160, **options)
    w1, w2, shared_w1, shared_w2 = SHARED[kind]
    for name, settings in (("shared_w1", shared_w1), ("shared_w2", shared_w2)):
        if settings:
            layer.options[name] = quantized(layer.options[name], **settings)
    return layer, quantized(layer.w1, **w1) if w1 else layer.w1, quantized(layer.w2, **w2) if w2 else layer.w2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SHARED)
def test_shared_experts(use_engine, engine, family, kind):
    """Shared experts of other sizes, bits and formats than the routed ones, in the same dispatches as ever."""
    use_engine(engine)
    for dtype, weights, routing in ((torch.float32, True, "dropped"), (torch.bfloat16, False, "random")):
        if engine == "exact" and weights is False:
            continue
        layer, w1, w2 = shared_layer(kind, TOKENS[family], dtype, shared_weights=weights, bias=True, routing=routing)
        check(layer, w1, w2, kernel=family)
        ran = metal_moe.last_dispatch()
        assignments = TOKENS[family] * (layer.topk_ids.shape[1] + 2)
        assert ran["dispatches"] == dispatches(engine, family, assignments, ran["row_tile"])
        assert ran["family"] == family + "_fp32acc"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", SHARED)
def test_decode_of_several_tokens_with_shared_experts(use_engine, engine, kind):
    use_engine(engine)
    layer, w1, w2 = shared_layer(kind, 2, torch.float32, shared_weights=True, bias=True, routing="dropped")
    check(layer, w1, w2, kernel="moe_decode")
    assert metal_moe.last_dispatch()["family"] == "moe_decode_fp32acc"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["relu2", "gelu_tanh", "swiglu_clamp"])
def test_shared_experts_activations_and_interleaving(use_engine, engine, family, activation):
    use_engine(engine)
    interleaved = activation == "swiglu_clamp"
    options = {"activation": activation, "interleaved": interleaved, "shared_weights": True}
    for kind in ("quantised", "only_w1", "only_w2", "crosswise"):
        layer, w1, w2 = shared_layer(kind, TOKENS[family], torch.float16, **options)
        check(layer, w1, w2, kernel=family)


@pytest.mark.parametrize("engine", ENGINES)
def test_shared_experts_wider_and_narrower_than_a_simdgroup_takes(use_engine, engine):
    """decode's down divides the K of all slots among simdgroups, whatever each slot has of it."""
    use_engine(engine)
    for intermediate, shared in ((64, 1056), (1056, 32), (1056, 1056)):
        layer = make_layer(1, 64, intermediate, 3, 2, torch.float32, shared=1, shared_intermediate=shared, bias=True)
        for name in ("shared_w1", "shared_w2"):
            layer.options[name] = quantized(layer.options[name], **AFFINE_4)
        check(layer, quantized(layer.w1, **AFFINE_4), quantized(layer.w2, **AFFINE_4))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_shared_experts_beside_trellis(use_engine, engine, tokens):
    """They run after the routed ones; so do trellis ones beside others."""
    use_engine(engine)

    def trellis(count: int) -> list[QuantizedExperts]:
        """w1 and w2 of 128 by 128."""
        return [
            QuantizedExperts.from_exl3([exl3_linear(128, rows, 4, seed=seed + e) for e in range(count)])
            for rows, seed in ((256, 1), (128, 9))
        ]

    for kind in ("routed", "shared"):
        layer = make_layer(tokens, 128, 128, 2, 2, torch.float32, shared=1, shared_weights=tokens == 5, bias=True)
        if kind == "routed":
            w1, w2 = trellis(2)
            if tokens == 5:
                for name in ("shared_w1", "shared_w2"):
                    layer.options[name] = quantized(layer.options[name], **AFFINE_4)
        else:
            w1, w2 = layer.w1, (quantized(layer.w2, **AFFINE_4) if tokens == 5 else layer.w2)
            layer.options["shared_w1"], layer.options["shared_w2"] = trellis(1)
        check(layer, w1, w2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["routed", "shared"])
def test_options_reach_shared_experts_beside_trellis(kind, activation, tokens, dtype):
    options = {"activation": activation, "bias": True, "interleaved": activation == "swiglu_clamp" and kind == "shared"}
    if activation == "swiglu_clamp":
        options |= {"alpha": 1.3, "limit": 0.8}
    layer = make_layer(tokens, 128, 128, 3, 2, DTYPES[dtype], shared=1, shared_weights=True, **options)
    w1, w2 = layer.w1, layer.w2
    if kind == "routed":
        w1 = quantized(
            {"gate": w1[:, :128], "up": w1[:, 128:]} if activation != "relu2" else w1, format="trellis", bits=8
        )
        w2 = quantized(w2, format="trellis", bits=8)
    else:
        layer.options["shared_w2"] = quantized(layer.options["shared_w2"], format="trellis", bits=8)
    check(layer, w1, w2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_experts_among_quantised_ones(use_engine, engine, family):
    """Of types of their own, whatever the activations are."""
    use_engine(engine)
    layer = make_layer(TOKENS[family], 96, 64, 4, 3, torch.float32, routing="dropped")
    kinds = [(torch.float16, "dense"), (torch.float32, "mxfp4"), (torch.bfloat16, "dense"), (torch.float32, "dense")]

    def mixed(w: torch.Tensor) -> QuantizedExperts:
        each = [quantized(w[e : e + 1].to(dtype), format=name) for e, (dtype, name) in enumerate(kinds)]
        return QuantizedExperts.cat(each)

    check(layer, mixed(layer.w1), mixed(layer.w2), kernel=family)


# hidden, intermediate: a tail alone, after a run, after what a simdgroup takes at a time; rows at odd addresses.
DENSE_SIZES = {"native": [(5, 7), (77, 45), (1, 129), (301, 1057), (96, 40)]}
DENSE_SIZES["exact"] = DENSE_SIZES["cuda"] = [(5, 7), (77, 45), (40, 1057)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_weights_of_any_size(use_engine, engine, family):
    """As a format, of the activations' type and of another: no size need be a multiple of anything."""
    use_engine(engine)
    for hidden, intermediate in DENSE_SIZES[engine]:
        for x_type, w_type in itertools.product([torch.float32, torch.bfloat16], [torch.float32, torch.float16]):
            if engine == "exact" and x_type != w_type:
                continue
            layer = make_layer(TOKENS[family], hidden, intermediate, 3, 2, x_type, bias=True, routing="dropped")
            w1, w2 = (quantized(w.to(w_type), format="dense") for w in (layer.w1, layer.w2))
            check(layer, w1, w2, kernel=family)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_shared_experts_of_any_size_beside_quantised_ones(use_engine, engine, family, dtype):
    use_engine(engine)
    layer = make_layer(TOKENS[family], 96, 64, 4, 2, DTYPES[dtype], shared=2, shared_intermediate=77)
    check(layer, quantized(layer.w1, **AFFINE_4), quantized(layer.w2, format="mxfp4"), kernel=family)
    layer = make_layer(TOKENS[family], 96, 45, 4, 2, DTYPES[dtype], shared=1, shared_intermediate=64)
    layer.options["shared_w1"] = quantized(layer.options["shared_w1"], **AFFINE_4)
    layer.options["shared_w2"] = quantized(layer.options["shared_w2"], **AFFINE_4)
    check(layer, layer.w1, layer.w2, kernel=family)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nvfp4_in_blocks_of_16(use_engine, engine, family):
    use_engine(engine)
    for hidden, intermediate in ((16, 48), (48, 16), (80, 112)):
        layer = make_layer(TOKENS[family], hidden, intermediate, 3, 2, torch.float32)
        w1, w2 = (quantized(w, format="nvfp4") for w in (layer.w1, layer.w2))
        check(layer, w1, w2, kernel=family)
    kinds = [{"format": "nvfp4"}, {"format": "dense"}, {"format": "nvfp4"}]
    layer = make_layer(TOKENS[family], 48, 80, 3, 2, torch.float32)
    w2 = QuantizedExperts.cat([quantized(layer.w2[e : e + 1], **settings) for e, settings in enumerate(kinds)])
    check(layer, w1 := quantized(layer.w1, format="nvfp4"), w2, kernel=family)
    check(layer, w1, layer.w2, kernel=family)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["float32", "float16", "bfloat16"])
def test_scale_types(use_engine, engine, scale, dtype):
    use_engine(engine)
    for family, tokens in TOKENS.items():
        for bits, group in ((4, 32), (4, 128), (3, 64)):
            # Several groups of a row, of 32 columns an odd number.
            layer = make_layer(tokens, 416 if group == 32 else 384, 128, 3, 2, DTYPES[dtype], bias=True)
            options = {"bits": bits, "group_size": group, "scale_dtype": getattr(torch, scale)}
            check(layer, quantized(layer.w1, **options), quantized(layer.w2, **options), kernel=family)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"bits": 4, "group_size": 32}, {"format": "dense"}], ids=name_of)
def test_types_that_differ_by_expert_alone(use_engine, engine, family, settings):
    """Of scales, or of dense weights: no kernel is compiled for one of them."""
    use_engine(engine)
    layer = make_layer(TOKENS[family], 128, 64, 3, 2, torch.float32)

    def mixed(w: torch.Tensor) -> QuantizedExperts:
        types = (torch.float32, torch.float16, torch.bfloat16)
        each = [quantized(w[e : e + 1].to(dtype), **settings) for e, dtype in enumerate(types)]
        return QuantizedExperts.cat(each)

    check(layer, mixed(layer.w1), mixed(layer.w2), kernel=family)
    assert metal_moe.last_dispatch()["specialization"] == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_extreme_scales(use_engine, engine):
    """e8m0 nearly to the ends of fp32, where weights are not normal numbers, and its NaN, which stays in its row."""
    use_engine(engine)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 64, 2, 16), generator=generator, dtype=torch.uint8)
    for code, size in ((0, 2.0**20), (1, 2.0**20), (20, 1.0), (127, 1.0), (230, 1.0), (252, 2.0**-20)):
        scales = torch.full((2, 64, 2), code, dtype=torch.uint8)
        w2 = QuantizedExperts.from_mxfp4(blocks, scales)
        for family, tokens in TOKENS.items():
            layer = make_layer(tokens, 64, 64, 2, 1, torch.float32)
            layer.w1 *= size
            check(layer, layer.w1, w2, kernel=family)
    scales = torch.full((2, 64, 2), 127, dtype=torch.uint8)
    scales[:, 5, 1] = 255
    layer = make_layer(1, 64, 64, 2, 1, torch.float32)
    w2 = QuantizedExperts.from_mxfp4(blocks, scales)
    out = Layer(layer.hidden_states, layer.w1, w2, layer.topk_weights, layer.topk_ids).run()
    assert out[0, 5].isnan() and not out[0, torch.arange(64) != 5].isnan().any()


def test_mxfp8_nan_is_nan(use_engine):
    for engine in ENGINES:
        use_engine(engine)
        layer = make_layer(1, 64, 64, 1, 1, torch.float32)
        w2 = quantized(layer.w2, format="mxfp8")
        w2.parts["weight"].codes[7 * 64 + 3] = 0x7F
        out = Layer(layer.hidden_states, layer.w1, w2, layer.topk_weights, layer.topk_ids).run()
        assert out[0, 7].isnan() and not out[0, torch.arange(64) != 7].isnan().any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_one_token_of_extreme_elements(use_engine, engine, dtype, group):
    """Products of a group in integers: elements far apart, groups of zeros, of the smallest and of no numbers."""
    use_engine(engine)
    # An odd number of groups, and more than a piece of x.
    sizes = [(17 * group, 3 * group, 4), (4096 + group, group, 4)] if engine == "native" else [(17 * group, group, 1)]
    for hidden, intermediate, experts in sizes:
        layer = make_layer(1, hidden, intermediate, experts, 1, dtype)
        w1, w2 = (quantized(w, format="affine", bits=4, group_size=group) for w in (layer.w1, layer.w2))
        x = layer.hidden_states
        check(layer, w1, w2)
        x[0, 7] = 300.0
        x[0, 128:256] = 0.0
        x[0, 256:384] *= torch.finfo(dtype).smallest_normal
        x[0, -1] = -100.0
        check(layer, w1, w2)
        x *= torch.finfo(dtype).smallest_normal
        small = Layer(x, w1, w2, layer.topk_weights, layer.topk_ids).run()
        assert small.isfinite().all() and small.abs().max() < 1e-3
        for bad in (torch.nan, torch.inf):
            x[0, 300] = bad
            assert not Layer(x, w1, w2, layer.topk_weights, layer.topk_ids).run().isfinite().any()


@pytest.mark.parametrize("engine", ENGINES)
def test_codes_that_are_not_aligned(use_engine, engine):
    """Up begins inside a fused tensor, at 4 bytes' alignment: 3-bit rows of 32 columns have 12 bytes."""
    use_engine(engine)
    for family, tokens in TOKENS.items():
        for bits in (2, 3, 4, 6):
            layer = make_layer(tokens, 32, 33, 3, 2, torch.float32)
            w1 = quantized(layer.w1, format="affine", bits=bits, group_size=32)
            check(layer, w1, layer.w2, kernel=family)


@pytest.mark.parametrize("engine", ENGINES)
def test_hidden_states_of_any_stride(use_engine, engine):
    use_engine(engine)
    layer = make_layer(5, 64, 64, 4, 2, torch.bfloat16)
    w1, w2 = quantized(layer.w1), quantized(layer.w2)
    wide = torch.zeros(10, 75, dtype=torch.bfloat16)
    expected = check(layer, w1, w2)
    layer.hidden_states = wide[::2, 3:67].copy_(layer.hidden_states)
    assert torch.equal(check(layer, w1, w2), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_fused_moe_routes_and_computes(use_engine, engine, tokens):
    use_engine(engine)
    layer = make_layer(tokens, 64, 64, 8, 2, torch.bfloat16)
    w1, w2 = quantized(layer.w1), quantized(layer.w2, format="mxfp4")
    logits = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(2))
    weights, ids = metal_moe.fused_topk(logits, 2)
    expected = metal_moe.fused_experts(layer.hidden_states, w1, w2, weights, ids)
    assert torch.equal(metal_moe.fused_moe(layer.hidden_states, w1, w2, logits, 2), expected)


def test_seeds_and_repeats_give_the_same_bits(exact_engine):
    layer = make_layer(20, 96, 64, 4, 2, torch.float16, routing="dropped")
    w1, w2 = quantized(layer.w1, format="mxfp4"), quantized(layer.w2, bits=3)
    for family in FAMILIES:
        results = []
        for seed in (1, 2, 3):
            exact_engine(seed)
            results.append(check(layer, w1, w2, kernel=family))
        assert all(torch.equal(results[0], result) for result in results)


def test_biases_of_the_weights_themselves():
    layer = make_layer(3, 64, 64, 4, 2, torch.float32, bias=True)
    bias1, bias2 = layer.options.pop("w1_bias"), layer.options.pop("w2_bias")
    w1, w2 = quantized(layer.w1, bias=bias1), quantized(layer.w2, bias=bias2)
    arguments = (layer.hidden_states, w1, w2, layer.topk_weights, layer.topk_ids)
    got = metal_moe.fused_experts(*arguments)
    layer.options.update(w1_bias=bias1, w2_bias=bias2)
    assert_close(got, reference_of(layer, w1, w2), tolerance=ROUNDING[got.dtype])
    with pytest.raises(ValueError, match="w1_bias is given; it must be None where w1 has a bias of its own"):
        metal_moe.fused_experts(*arguments, w1_bias=bias1)


def test_what_is_refused():
    layer = make_layer(2, 128, 128, 4, 2, torch.float32)
    w1, w2 = quantized(layer.w1), quantized(layer.w2)
    pair = quantized(layer.w1, bits={"gate": 4, "up": 2})
    biased = quantized(layer.w1, bias=torch.zeros(4, 256))
    trellis = quantized(layer.w2[:1], format="trellis", bits=8)
    cat = QuantizedExperts.cat([w2, trellis])

    def run(first, second, **options):
        x, weights, ids = layer.hidden_states, layer.topk_weights, layer.topk_ids
        return metal_moe.fused_experts(x, first, second, weights, ids, **options)

    for text, call in {
        r"shared_w2 has shape \(4, 128, 64\); it must be": lambda: run(
            w1, w2, shared_w1=w1, shared_w2=layer.w2[:, :, :64].contiguous()
        ),
        "shared_w1 is with a bias; it must be without": lambda: run(w1, w2, shared_w1=biased, shared_w2=w2),
        "shared_weights has shape": lambda: run(w1, w2, shared_w1=w1, shared_w2=w2, shared_weights=torch.ones(2, 3)),
        "interleaved is True; it must be False where gate and up of shared_w1": lambda: run(
            w1, w2, shared_w1=pair, shared_w2=w2, interleaved=True
        ),
        "interleaved is True; it must be False where gate and up": lambda: run(pair, w2, interleaved=True),
        'w1 is a pair of gate and up; it must be one matrix per expert with activation "relu2"': lambda: run(
            pair, w2, activation="relu2"
        ),
        "w2 is a pair of gate and up; it must be one matrix per expert": lambda: run(w1, pair),
        r"w2 is affine \(expert 0\); it must be trellis, as others of w2 are": lambda: run(w1, cat),
        r"w2 has shape \(1, 128, 128\); it must be": lambda: run(w1, trellis),
        r"w2 has shape \(4, 128, 64\); it must be": lambda: run(w1, quantized(layer.w2[:, :, :64].contiguous())),
        r"w1 has shape \(4, 256, 64\); it must be": lambda: run(quantized(layer.w1[:, :, :64].contiguous()), w2),
        "kernel is 'fast': must be one of": lambda: run(w1, w2, kernel="fast"),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="w2 is of type list; it must be a torch.Tensor or QuantizedExperts"):
        run(w1, [1])
    with pytest.raises(TypeError, match="w2 is torch.float16; it must be torch.float32"):
        run(w1, layer.w2.half())
    with pytest.raises(TypeError, match="shared_w2 is None; it must be a torch.Tensor where shared_w1 is given"):
        run(w1, w2, shared_w1=w1)
    with pytest.raises(TypeError, match="shared_w1 is torch.float16; it must be torch.float32"):
        run(w1, w2, shared_w1=layer.w1.half(), shared_w2=layer.w2)
    with pytest.raises(TypeError, match="shared_w2 is None; it must be a torch.Tensor where shared_w1 is given"):
        run(layer.w1, layer.w2, shared_w1=quantized(layer.w1[:1], format="trellis", bits=8))


def test_buffers_that_are_not_aligned_are_refused(use_engine):
    use_engine("native")  # a copy on another device would be aligned
    layer = make_layer(2, 64, 64, 4, 2, torch.float32)
    w2 = quantized(layer.w2)
    part = w2.parts["weight"]
    moved = torch.zeros(part.codes.numel() + 4, dtype=torch.uint8)[4:].copy_(part.codes)
    unaligned = QuantizedExperts({"weight": type(part)(moved, part.scales, part.biases, part.table)})
    arguments = (layer.hidden_states, layer.w1, unaligned, layer.topk_weights, layer.topk_ids)
    with pytest.raises(ValueError, match=r"w2 has codes at an address that is 4 beyond a multiple of 16.*aligned\(\)"):
        metal_moe.fused_experts(*arguments)
    layer.options = {}
    check(layer, layer.w1, unaligned.aligned())


def flat_arguments(layer: Layer, w1: QuantizedExperts, w2: QuantizedExperts) -> tuple:
    def buffers(part):
        return [part.codes, part.scales, part.biases, part.table]

    gate, up = w1.gate_up()
    routes = (layer.topk_weights, layer.topk_ids)
    return (
        layer.hidden_states,
        buffers(gate) + buffers(up),
        list(w1.shape),
        buffers(w2.parts["weight"]),
        list(w2.shape),
        *([], [], [], []),  # no shared experts
        *routes,
    )


def test_the_operator_under_opcheck_and_in_a_compiled_graph(use_engine):
    use_engine("native")  # as the compiled graph, whose tensors are the CPU's
    layer = make_layer(3, 64, 64, 4, 2, torch.bfloat16)
    w1, w2 = quantized(layer.w1), quantized(layer.w2, format="mxfp4")
    arguments = flat_arguments(layer, w1, w2)
    torch.library.opcheck(torch.ops.metal_moe.fused_experts_quantized, arguments)
    logits = torch.randn(3, 4)
    torch.library.opcheck(torch.ops.metal_moe.fused_moe_quantized, (*arguments[:9], logits, 2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors):
        return torch.ops.metal_moe.fused_experts_quantized(*tensors) * 2

    expected = metal_moe.fused_experts(layer.hidden_states, w1, w2, layer.topk_weights, layer.topk_ids)
    assert torch.equal(compiled(*arguments), expected * 2)

    def layer_function(x, weights, ids):
        return metal_moe.fused_experts(x, w1, w2, weights, ids)

    with_container = torch.compile(layer_function, backend="aot_eager")
    assert torch.equal(with_container(layer.hidden_states, layer.topk_weights, layer.topk_ids), expected)


COMPILED = {
    "affine": ({"group_size": 32}, {"group_size": 32}, False),
    "pair": ({"bits": {"gate": 6, "up": 2}, "group_size": 32}, {"format": "mxfp8"}, False),
    "interleaved": ({"format": "mxfp4"}, {"format": "nvfp4"}, True),
    "trellis": ({"format": "trellis", "bits": {"gate": 1, "up": 6}}, {"format": "trellis", "bits": 8}, False),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_torch_compile(kind, use_engine):
    """In one graph, of weights that no call has seen yet, and of others that the same function gets afterwards."""
    use_engine("native")  # a graph's calls are not moved to another device, as the others are
    settings1, settings2, interleaved = COMPILED[kind]
    torch.compiler.reset()
    layer = make_layer(3, 128, 128, 3, 2, torch.float32, interleaved=interleaved)

    def run(w1, w2):
        arguments = (layer.hidden_states, w1, w2, layer.topk_weights, layer.topk_ids)
        return 2 * metal_moe.fused_experts(*arguments, interleaved=interleaved)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for factor in (1, 3):
        w1, w2 = quantized(layer.w1, **settings1), quantized(factor * layer.w2, **settings2)
        results.append(compiled(w1, w2))
        assert torch.equal(results[-1], run(w1, w2))
    assert not torch.equal(*results)
    w2.parts["weight"] = quantized(layer.w2, **settings2).parts["weight"]
    assert torch.equal(compiled(w1, w2), results[0]), "parts that replace others"
