"""Kernels compiled for how a layer's experts are stored: which layers have them, their names, and that results are
those of the kernels that serve every format, bit for bit."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cases
import metal_moe
import pytest
import torch
from cases import ENGINES, FAMILIES, Layer, make_layer
from metal_moe import QuantizedExperts
from test_quantized import reference_of
from test_trellis_layer import layer as trellis_layer
from test_trellis_layer import pair as trellis_pair
from test_trellis_layer import run as run_trellis

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
FORMATS = [{"format": "affine", "bits": bits, "group_size": group} for bits in AFFINE_BITS for group in (32, 64, 128)]
FORMATS += [{"format": "mxfp4"}, {"format": "mxfp8"}, {"format": "nvfp4"}]
BITS = {"mxfp4": 4, "mxfp8": 8, "nvfp4": 4}
TOKENS = {"moe_decode": 1, "moe_prefill4": 7, "moe_base": 9, "moe_large_batch": 20, "moe_simd": 20}


@pytest.fixture(autouse=True)
def specialized_afterwards():
    yield
    metal_moe.set_specialization(True)


def specialization() -> str:
    return metal_moe.last_dispatch()["specialization"]


def both(layer: Layer, w1, w2, packed: bool = False, **overrides) -> str:
    """What the specialised kernels are called, after comparing them with the others. `packed`: they add in another
    order."""
    own = Layer(layer.hidden_states, w1, w2, layer.topk_weights, layer.topk_ids, layer.options)
    specialized = own.run(**overrides)
    name = specialization()
    metal_moe.set_specialization(False)
    generic = own.run(**overrides)
    assert specialization() == ""
    metal_moe.set_specialization(True)
    if packed:
        for out in (specialized, generic):
            cases.assert_close(out, reference_of(layer, w1, w2), tolerance=cases.ROUNDING[out.dtype])
    else:
        assert torch.equal(specialized, generic)
    return name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", FORMATS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_results_are_those_of_the_generic_kernels(use_engine, engine, family, settings):
    use_engine(engine)
    for dtype in [torch.float32] if engine == "exact" else cases.DTYPES.values():
        layer = make_layer(TOKENS[family], 128, 128, 3, 2, dtype, bias=True)
        w1, w2 = (QuantizedExperts.quantize(w, **settings) for w in (layer.w1, layer.w2))
        bits = settings.get("bits") or BITS[settings["format"]]
        between = {"moe_decode": "_decode", "moe_base": "_fp32acc"}.get(family, family.removeprefix("moe") + "_fp32acc")
        expected = f"moe_{settings['format']}_swiglu{between}_{bits}_{bits}_{bits}"
        packed = engine == "cuda" and settings.get("bits") == 4 and dtype != torch.float32
        assert both(layer, w1, w2, packed, kernel=family) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_all_combinations_of_bits(use_engine, engine):
    """Of gate, up and down: each has kernels of its own, named as in the published table."""
    use_engine(engine)
    layer = make_layer(1, 64, 64, 3, 2, torch.float32)
    options = {"format": "affine", "group_size": 64}
    gates, ups = (
        {bits: QuantizedExperts.quantize(w, bits=bits, **options).parts["weight"] for bits in AFFINE_BITS}
        for w in layer.w1.chunk(2, 1)
    )
    downs = {bits: QuantizedExperts.quantize(layer.w2, bits=bits, **options) for bits in AFFINE_BITS}
    combinations = list(itertools.product(AFFINE_BITS, repeat=3))
    for gate, up, down in combinations if engine != "exact" else combinations[::17]:
        w1 = QuantizedExperts({"gate": gates[gate], "up": ups[up]})
        name = both(layer, w1, downs[down])
        assert name == f"moe_affine_swiglu_decode_{gate}_{up}_{down}"
        published, _ = metal_moe.select_moe_kernel(1, True, gate, up, down)
        assert name == published.replace("trellis", "affine")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("rates", "codebook"),
    [
        ((6, 2, 3), "mul1"),
        ((6, 3, 4), "mcg"),
        ((6, 2, 4), "3inst"),
        ((1, 8, 5), "mcg"),
        ((7, 7, 7), "3inst"),
        ((2.5, 3, 7.5), "mul1"),
    ],
)
def test_trellis(use_engine, engine, tokens, rates, codebook):
    use_engine(engine)
    arguments = trellis_layer(128, 128, [[(bits, codebook)] for bits in rates], tokens, torch.float32)
    specialized = run_trellis(*arguments)
    bits = "_".join(f"{rate:g}" for rate in rates)
    family = "decode" if tokens == 1 else metal_moe.last_dispatch()["family"].removeprefix("moe_")
    assert specialization() == f"moe_trellis_swiglu_{family}_{bits}"
    if tokens == 1:
        assert specialization() == metal_moe.select_moe_kernel(1, True, *rates)[0]
    metal_moe.set_specialization(False)
    assert torch.equal(run_trellis(*arguments), specialized)
    assert specialization() == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_kernels_are_asked_for_by_their_names(use_engine, engine):
    """What `select_moe_kernel` and `last_dispatch` call them, for a layer that has them."""
    use_engine(engine)
    x, gate_up, down, weights, ids = trellis_layer(128, 128, [[(bits, "mul1")] for bits in (6, 2, 3)], 2, torch.float32)
    w1 = trellis_pair(gate_up)

    def run(kernel: str | None) -> torch.Tensor:
        return metal_moe.fused_experts(x, w1, down, weights, ids, kernel=kernel)

    for tokens, acc, family in (
        (1, False, "decode"),
        (2, True, "prefill4"),
        (17, False, "base"),
        (33, False, "large_batch"),
    ):
        name, _ = metal_moe.select_moe_kernel(tokens, acc, 6, 2, 3)
        got = run(name)
        ran = metal_moe.last_dispatch()
        assert (ran["family"], ran["chosen_by"]) == (f"moe_{family}_fp32acc", "kernel")
        assert ran["specialization"].startswith(name) and ran["specialization"].endswith("_6_2_3")
        assert torch.equal(got, run("moe_" + family)) and torch.equal(got, run(ran["specialization"]))
    for name in ("moe_trellis_swiglu_decode_6_3_4", "moe_affine_swiglu_decode", "moe_trellis_geglu_decode_6_2_3"):
        with pytest.raises(ValueError, match=f"kernel is '{name}': must be .* as 'moe_trellis_swiglu_decode_6_2_3'"):
            run(name)
    metal_moe.set_specialization(False)
    with pytest.raises(ValueError, match="kernel is 'moe_trellis_swiglu_decode_6_2_3': must be one of"):
        run("moe_trellis_swiglu_decode_6_2_3")
    run("moe_trellis_swiglu_decode")


@pytest.mark.parametrize("engine", ENGINES)
def test_shared_experts_of_another_kind_have_generic_kernels(use_engine, engine):
    """They run in the dispatch of the routed ones, so a kernel is compiled for what both are."""
    use_engine(engine)
    layer = make_layer(1, 64, 64, 4, 2, torch.float32, shared=1, shared_intermediate=96)
    one = {"format": "affine", "bits": 4, "group_size": 32}
    w1, w2 = (QuantizedExperts.quantize(w, **one) for w in (layer.w1, layer.w2))
    shared = {name: layer.options[name] for name in ("shared_w1", "shared_w2")}
    for other, name in (
        ({}, "moe_affine_swiglu_decode_4_4_4"),
        ({"bits": 3}, ""),
        ({"format": "dense", "bits": None, "group_size": None}, ""),
    ):
        settings = {**one, **other}
        layer.options.update({key: QuantizedExperts.quantize(w, **settings) for key, w in shared.items()})
        assert both(layer, w1, w2) == name
    layer.options["shared_w1"] = QuantizedExperts.quantize(shared["shared_w1"], **one)
    assert both(layer, w1, w2) == "moe_affine_swiglu_decode_4_4_any"
    layer.options.update(shared)
    assert both(layer, w1, w2) == "", "dense tensors"


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_whose_experts_differ_have_generic_kernels(use_engine, engine):
    use_engine(engine)
    layer = make_layer(3, 64, 64, 4, 2, torch.float32)
    one = {"format": "affine", "bits": 4, "group_size": 32}
    uniform1, uniform2 = (QuantizedExperts.quantize(w, **one) for w in (layer.w1, layer.w2))

    def mixed(w, other):
        parts = [QuantizedExperts.quantize(w[:3], **one), QuantizedExperts.quantize(w[3:], **{**one, **other})]
        return QuantizedExperts.cat(parts)

    # On cuda few tokens of quantised weights are decode, and beside dense ones base, which has no other name.
    family, beside_dense = [metal_moe.select_moe_kernel(2, True)[0]] * 2
    if engine == "cuda":
        family, beside_dense = "moe_decode", "moe_fp32acc"
    stem, stem_beside_dense = (name.replace("moe_", "moe_affine_swiglu_") for name in (family, beside_dense))
    for other in ({"bits": 3}, {"group_size": 64}, {"format": "mxfp4", "group_size": None}):
        assert both(layer, uniform1, mixed(layer.w2, other)) == f"{stem}_4_4_any"
        assert both(layer, mixed(layer.w1, other), uniform2) == f"{stem}_any_any_4"
        assert both(layer, mixed(layer.w1, other), mixed(layer.w2, other)) == ""
    mxfp4 = QuantizedExperts.quantize(layer.w2, format="mxfp4")
    assert both(layer, uniform1, mxfp4) == stem.replace("affine", "mixed") + "_4_4_4"
    assert both(layer, uniform1, layer.w2) == f"{stem_beside_dense}_4_4_any", "beside dense weights"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        ("silu", "swiglu_decode_4_4_4"),
        ("gelu", "geglu_decode_4_4_4"),
        ("gelu_tanh", "geglu_tanh_decode_4_4_4"),
        ("relu2", "relu2_decode_4_4"),
        ("swiglu_clamp", "swiglu_clamp_decode_4_4_4"),
    ],
)
def test_activations_are_part_of_the_name(use_engine, engine, activation, name):
    use_engine(engine)
    layer = make_layer(1, 64, 64, 3, 2, torch.float32, activation=activation, interleaved=activation == "swiglu_clamp")
    w1, w2 = (QuantizedExperts.quantize(w, format="mxfp4") for w in (layer.w1, layer.w2))
    assert both(layer, w1, w2) == f"moe_mxfp4_{name}"


def test_rows_that_begin_anywhere_are_told_apart(use_engine):
    """Two layers alike but for where rows begin: the one with rows off multiples of 16 bytes is read as such."""
    use_engine("native" if "native" in ENGINES else ENGINES[0])
    for hidden in (128, 96):  # 4 bits: rows of 64 bytes, and of 48; 3 bits: of 48, and of 36
        layer = make_layer(1, hidden, 32, 3, 2, torch.float32)
        for bits in (3, 4):
            w1, w2 = (
                QuantizedExperts.quantize(w, format="affine", bits=bits, group_size=32) for w in (layer.w1, layer.w2)
            )
            assert both(layer, w1, w2) == f"moe_affine_swiglu_decode_{bits}_{bits}_{bits}"


def test_layers_run_side_by_side(use_engine):
    """Two specialisations of one kernel in turn and at the same time, from several threads."""
    engine = ENGINES[0]
    use_engine(engine)
    layers = []
    for bits in (3, 4, 6, 8):
        layer = make_layer(1, 256, 128, 4, 2, torch.float32, seed=bits)
        layer.w1, layer.w2 = (
            QuantizedExperts.quantize(w, format="affine", bits=bits, group_size=64) for w in (layer.w1, layer.w2)
        )
        layers.append((layer, layer.run(), f"moe_affine_swiglu_decode_{bits}_{bits}_{bits}"))

    def work(first: int) -> None:
        for i in range(100):
            layer, expected, name = layers[(first + i) % len(layers)]
            assert torch.equal(layer.run(), expected)
            assert specialization() == name

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, first) for first in range(4)]:
            done.result()


def test_fused_moe_has_them_too(use_engine):
    use_engine(ENGINES[0])
    layer = make_layer(1, 64, 64, 3, 2, torch.float32)
    w1, w2 = (QuantizedExperts.quantize(w, format="mxfp8") for w in (layer.w1, layer.w2))
    metal_moe.fused_moe(layer.hidden_states, w1, w2, layer.topk_weights.new_zeros(1, 3), 2)
    assert specialization() == "moe_mxfp8_swiglu_decode_8_8_8"


def test_dense_layers_have_none(use_engine):
    use_engine(ENGINES[0])
    make_layer(1, 64, 64, 3, 2, torch.float32).run()
    assert specialization() == ""


def test_kernels_that_are_specialised_are_listed():
    trellis = {f"trellis_product_m{rows}": 2 for rows in (4, 8, 16, 64)}
    trellis |= {"trellis_gate_up_decode": 2, "trellis_down_decode": 1}
    for kernel in metal_moe.kernels():
        expected = 2 if kernel["stage"] == "gate_up" else 1
        if kernel["name"] in trellis:
            expected = trellis[kernel["name"]]
        elif kernel["format"] != "quantized":
            expected = 0
        assert kernel["coded_matrices"] == expected, kernel["name"]


@pytest.mark.parametrize("value", ["0", "1"])
def test_environment(value):
    code = (
        "import torch, metal_moe as m; w = torch.randn(2, 64, 64)\n"
        "q = m.QuantizedExperts.quantize(torch.cat([w, w], 1)), m.QuantizedExperts.quantize(w)\n"
        "m.fused_experts(torch.randn(1, 64), *q, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))\n"
        "print(m.last_dispatch()['specialization'])"
    )
    environment = {**os.environ, "METAL_MOE_SPECIALIZE": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("" if value == "0" else "moe_affine_swiglu_decode_4_4_4")


def test_wrong_switch():
    with pytest.raises(TypeError, match="set_specialization: enabled"):
        metal_moe.set_specialization(1)
