"""Layers with trellis weights against the same layer in float64 with what the codes decode to."""

import cases
import metal_moe
import pytest
import torch
from metal_moe.formats import QuantizedExperts
from metal_moe.formats.part import Part
from test_formats_trellis import exl3_linear
from test_trellis_kernels import CODES

E = 3
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_clamp")
DECODE = ["trellis_gate_up_decode", "trellis_down_decode", "rotate_outputs"]


def default_kernels(tokens: int, top_k: int, count: int) -> list[str]:
    """Large row tiles from four rows of an expert on, but on the exact engine; on GPUs of eight up to 5 1/3 rows."""
    if tokens == 1:
        return DECODE
    engine, rows = metal_moe.last_dispatch()["engine"], tokens * top_k / count
    large = 8 if engine == "cuda" and 1.5 * rows <= 8 else 16
    product = f"trellis_product_m{large if engine != 'exact' and rows >= 4 else 4}"
    return ["group", "rotate_inputs", product, "rotate_activations", product, "rotate_outputs"]


def experts(rows: int, columns: int, kinds: list[tuple[float, str]], seed: int, count: int = E) -> QuantizedExperts:
    """Random codes with scales that keep a product's size near that of its input; sizes are rounded up in storage."""
    padded = [-(-size // 128) * 128 for size in (columns, rows)]
    linears = []
    for index in range(count):
        bits, codebook = kinds[index % len(kinds)]
        linear = exl3_linear(*padded, bits, codebook, seed=seed + index)
        linear["svh"] = linear["svh"] / columns**0.5
        linears.append(linear)
    return QuantizedExperts.from_exl3(linears, shape=(rows, columns))


def pair(gate_up: list[QuantizedExperts]) -> QuantizedExperts:
    """As w1."""
    if len(gate_up) == 1:
        return gate_up[0]
    return QuantizedExperts({"gate": gate_up[0].parts["weight"], "up": gate_up[1].parts["weight"]})


def run(x, gate_up, down, weights, ids, activation="silu", bias1=None, bias2=None):
    return metal_moe.fused_experts(
        x, pair(gate_up), down, weights, ids, activation=activation, w1_bias=bias1, w2_bias=bias2
    )


def check(x, gate_up, down, weights, ids, activation="silu", bias1=None, bias2=None):
    got = run(x, gate_up, down, weights, ids, activation, bias1, bias2)
    assert metal_moe.last_dispatch()["kernels"] == default_kernels(*ids.shape, down.shape[0])
    w1 = torch.cat([part.dequantize(torch.float64) for part in gate_up], 1)
    w2 = down.dequantize(torch.float64)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    size = torch.zeros_like(expected)
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if not 0 <= expert < len(w2):
                continue
            bias = None if bias1 is None else bias1[expert].double()
            h = w1[expert] @ x[token].double()
            h = h if bias is None else h + bias
            h = activate(activation, h)
            y = w2[expert] @ h + (0 if bias2 is None else bias2[expert].double())
            expected[token] += weights[token, slot].double() * y
            size[token] += weights[token, slot].double().abs() * (w2[expert].abs() @ h.abs())
    assert got.dtype == x.dtype
    # fp32 all along, then one rounding to the type: sums of a few hundred products, each side of two rotations.
    limit = 2e-6 * size.amax(1, keepdim=True) + torch.finfo(x.dtype).eps / 2 * expected.abs()
    error = (got.double() - expected).abs()
    assert (error <= limit).all(), float((error / limit).max())
    return got


def activate(kind: str, h: torch.Tensor) -> torch.Tensor:
    if kind == "relu2":
        return h.clamp(min=0).square()
    gate, up = h.chunk(2)
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    if kind.startswith("gelu"):
        return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def layer(hidden, intermediate, kinds, tokens, dtype, top_k=2, gated=True):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    gate_up = [experts(intermediate, hidden, kinds[p], 10 * p) for p in range(2 if gated else 1)]
    down = experts(hidden, intermediate, kinds[2], 30)
    ids = torch.stack([torch.randperm(E, generator=generator)[:top_k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, top_k, generator=generator)
    return x, gate_up, down, weights, ids


MIXES = {
    "6_2_3": [[(6, "mul1")], [(2, "mul1")], [(3, "mul1")]],
    "experts_differ": [
        [(4, "3inst"), (1, "mcg"), (8, "mul1")],
        [(2.5, "mul1"), (5, "mcg")],
        [(7, "3inst"), (3.5, "mul1")],
    ],
}


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("mix", MIXES)
def test_layers(mix, tokens, dtype, engine, use_engine):
    use_engine(engine)
    check(*layer(256, 128, MIXES[mix], tokens, dtype))


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("first", range(0, len(CODES), E))
def test_every_code(first, tokens, engine, use_engine):
    """Each rate with each codebook that it has, an expert each."""
    use_engine(engine)
    codes = (CODES + CODES[:E])[first : first + E]
    check(*layer(128, 128, [codes] * 3, tokens, torch.float32, top_k=E))


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(2304, 128), (128, 2304), (1280, 640)])
def test_inputs_in_slices(hidden, intermediate, engine, use_engine):
    """More inputs than fit into threadgroup memory, or than one threadgroup should take; slices of unequal size."""
    use_engine(engine)
    check(*layer(hidden, intermediate, MIXES["6_2_3"], 1, torch.float16))


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_more_slots_than_simdgroups_that_sum_them(tokens, engine, use_engine):
    use_engine(engine)
    generator = torch.Generator().manual_seed(7)
    gate, up, down = (experts(128, 128, MIXES["6_2_3"][p], 10 * p, count=19) for p in range(3))
    ids = torch.stack([torch.randperm(19, generator=generator) for _ in range(tokens)])
    ids[:, 3] = -1
    x = torch.randn(tokens, 128, generator=generator)
    check(x, [gate, up], down, torch.randn(tokens, 19, generator=generator), ids)


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("scale", [1e15, 1e-10])
def test_inputs_of_any_size(scale, engine, use_engine):
    """Beyond what fp16 holds; and blocks of 128 that differ much in size."""
    use_engine(engine)
    x, *rest = layer(384, 256, MIXES["6_2_3"], 1, torch.float32)
    x[:, :128] *= 1e-6
    check(x * scale, *rest)


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_sizes_that_were_rounded_up(tokens, engine, use_engine):
    use_engine(engine)
    check(*layer(200, 180, MIXES["6_2_3"], tokens, torch.float32))


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(activation, engine, use_engine):
    use_engine(engine)
    gated = activation != "relu2"
    values = layer(128, 72, MIXES["6_2_3"], 3, torch.float32, gated=gated)
    generator = torch.Generator().manual_seed(5)
    bias1 = torch.randn(E, (2 if gated else 1) * 72, generator=generator)
    bias2 = torch.randn(E, 128, generator=generator)
    check(*values, activation, bias1, bias2)


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_ids_outside_add_nothing(tokens, engine, use_engine):
    use_engine(engine)
    x, gate_up, down, weights, ids = layer(128, 128, MIXES["6_2_3"], tokens, torch.float32)
    ids = ids.long()
    ids[0, 0], ids[-1, 1] = -1, E
    check(x, gate_up, down, weights, ids)


@pytest.mark.parametrize("tokens", [1, 5])
def test_any_order_of_threads_gives_the_same(tokens, exact_engine):
    values = layer(128, 128, MIXES["experts_differ"], tokens, torch.float16)
    results = []
    for seed in (1, 2, 3):
        exact_engine(seed)
        results.append(run(*values))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_routing_in_the_same_call():
    x, gate_up, down, _, _ = layer(128, 128, MIXES["6_2_3"], 4, torch.float16)
    logits = torch.randn(4, E, generator=torch.Generator().manual_seed(6))
    got = metal_moe.fused_moe(x, pair(gate_up), down, logits, 2)
    assert metal_moe.last_dispatch()["kernels"][:2] == ["route", "group"]
    assert torch.equal(got, run(x, gate_up, down, *metal_moe.fused_topk(logits, 2)))


def test_a_fused_w1():
    x, _, down, weights, ids = layer(128, 128, MIXES["6_2_3"], 3, torch.float32)
    w1 = experts(256, 128, [(3, "mul1")], 50)
    gate, up = w1.gate_up()
    apart = QuantizedExperts({"gate": gate, "up": up})
    got = metal_moe.fused_experts(x, w1, down, weights, ids)
    assert torch.equal(got, metal_moe.fused_experts(x, apart, down, weights, ids))


def test_what_is_refused():
    x, gate_up, down, weights, ids = layer(128, 128, MIXES["6_2_3"], 2, torch.float32)
    apart = down.parts["weight"].codes
    for offset in (1, 4) if cases.DEVICE.type == "cpu" else ():  # elsewhere tests' tensors are copied, and then aligned
        moved = torch.cat([apart.new_zeros(offset), apart])[offset:]
        part = Part(moved, *(getattr(down.parts["weight"], name) for name in ("scales", "biases", "table")))
        with pytest.raises(ValueError, match="w2 has codes at an address that is .* beyond a multiple of 16"):
            metal_moe.fused_experts(x, pair(gate_up), QuantizedExperts({"weight": part}), weights, ids)
