"""`QuantizedExperts` and calls with them: what is taken, what is refused and how, whatever PyTorch's defaults are."""

import metal_moe
import pytest
import torch
from metal_moe import QuantizedExperts
from torch._subclasses.fake_tensor import FakeTensorMode

quantize = QuantizedExperts.quantize


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def routes(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.long)


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_default_type(dtype, default_dtype):
    """Checkpoints are often read under a default type of their own."""
    w, hessian = weights(1, 32, 128), torch.eye(128)
    plain, calibrated = (quantize(w, format="trellis", bits=2, hessian=h) for h in (None, hessian))
    expected = plain.dequantize(torch.float32)
    default_dtype(dtype)
    for before, h in ((plain, None), (calibrated, hessian)):
        made = quantize(w, format="trellis", bits=2, hessian=h)
        assert all(torch.equal(made.state_dict()[name], t) for name, t in before.state_dict().items())
    for _ in range(4):
        assert torch.equal(plain.dequantize(torch.float32), expected)


def test_a_default_device():
    w, hessian = weights(1, 32, 128), torch.eye(128)
    with torch.device("meta"):
        made = quantize(w, format="trellis", bits=2, hessian=hessian)
    assert torch.equal(made.dequantize(), quantize(w, format="trellis", bits=2, hessian=hessian).dequantize())


def test_experts_to_dequantize():
    experts = quantize(weights(3, 64, 128))
    expected = experts.dequantize()[[2, 0]]
    for some in ([2, 0], (2, 0), torch.tensor([2, 0]), iter([2, 0])):
        assert torch.equal(experts.dequantize(experts=some), expected)
    for some in ([0.5], 1, "01", [None]):
        with pytest.raises(TypeError, match="experts is .*; it must be numbers of experts"):
            experts.dequantize(experts=some)
    with pytest.raises(ValueError, match="experts has 3; it must be from 0 to 2"):
        experts.dequantize(experts=[3])
    for dtype in (torch.int8, torch.bool, torch.complex64, None):
        with pytest.raises(TypeError, match="dtype is"):
            experts.dequantize(dtype)


def test_bits_in_any_order_and_container():
    w = weights(2, 128, 64)
    made = quantize(w, bits={"up": torch.tensor([2, 3]), "gate": 6})
    assert [s.bits for s in made.parts["gate"].settings] == [6, 6]
    assert [s.bits for s in made.parts["up"].settings] == [2, 3]
    sides = {"up": w[:, 64:], "gate": w[:, :64]}
    assert torch.equal(quantize(sides, bits={"gate": 6, "up": [2, 3]}).dequantize(), made.dequantize())
    assert tuple(QuantizedExperts({"up": made.parts["up"], "gate": made.parts["gate"]}).parts) == ("gate", "up")


REFUSED = {
    "bits": ({"bits": {"gate": 6, "Up": 2}}, "bits has the keys"),
    "bits of gate alone": ({"bits": {"gate": 6}}, "bits has the keys"),
    "hessian": ({"format": "trellis", "hessian": {"gate": 1, "up": 2}}, "hessian has the keys"),
    "text": ({"bits": "444"}, "bits is '444'"),
    "one too few": ({"bits": [4]}, "bits has 1 entries; it must have 2"),
    "true": ({"bits": True}, "bits is True"),
    "no number": ({"bits": float("nan")}, "bits is nan"),
    "huge": ({"bits": 10**400}, "bits is 1000"),
    "group": ({"group_size": 64.0}, "group_size is 64.0; it must be an int"),
    "groups": ({"group_size": [64]}, r"group_size is \[64\]; it must be an int"),
    "format": ({"format": "awq"}, "format is 'awq'"),
    "bias elsewhere": ({"bias": torch.zeros(2, 128, device="meta")}, "bias is on meta; it must be on cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_of_quantize(case):
    arguments, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=f"QuantizedExperts.*{message}"):
        quantize(weights(2, 128, 64), **arguments)


def test_values_that_are_no_weights():
    w = weights(2, 128, 128)
    for given, message in (
        ({"gate": 1, "up": 2}, r'w\["gate"\] is of type int'),
        (torch.tensor(1.0), r"w has shape \(\)"),
        (w.to("meta"), "w is on the meta device"),
        (torch.stack([w[0], w[1] * torch.inf]), "w has infinite or NaN values in expert 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            quantize(given)
    for size, settings in (
        (1e6, {"format": "trellis"}),
        (1e6, {"scale_dtype": torch.float16}),
        (1e6, {"format": "nvfp4"}),
    ):
        with pytest.raises(ValueError, match="w has values up to"):
            quantize(torch.stack([w[0], w[1] * size]), **settings)
    for size, settings in ((1e-8, {"format": "trellis"}), (1e-4, {"format": "nvfp4"})):
        with pytest.raises(ValueError, match="expert 1 of w has values up to .*, too small"):
            quantize(torch.stack([w[0], w[1] * size]), **settings)


def test_values_that_are_no_experts():
    part = quantize(weights(2, 64, 64)).parts["weight"]
    words = torch.zeros(2, 64, 8, dtype=torch.int32)
    scales = torch.zeros(2, 64, 1)
    for function, message in (
        (lambda: QuantizedExperts(None), "parts is no mapping"),
        (lambda: QuantizedExperts({"weight": words}), "parts is no mapping"),
        (lambda: QuantizedExperts({"gate": part, "Up": part}), "parts are"),
        (lambda: QuantizedExperts.cat([]), "experts must be one or more"),
        (lambda: QuantizedExperts.cat([words]), "experts must be one or more"),
        (lambda: QuantizedExperts.from_state_dict(None), "state is of type NoneType"),
        (lambda: quantize(weights(2, 64, 64)).to("meta"), "table is on the meta device"),
        (lambda: QuantizedExperts.from_exl3({}), "experts is of type dict"),
        (lambda: QuantizedExperts.from_exl3([None]), r"experts\[0\] is no mapping"),
        (lambda: QuantizedExperts.from_exl3([{"trellis": 1}]), r"experts\[0\] is no mapping"),
        (lambda: QuantizedExperts.from_exl3([{}], shape=100), "shape is 100"),
        (lambda: QuantizedExperts.from_mlx(words, scales, mode="dense"), "mode is 'dense'; it must be one of affine"),
        (lambda: QuantizedExperts.from_mlx([words, words], scales, scales), "weight is a pair"),
        (lambda: QuantizedExperts.from_mlx([words] * 2, [scales] * 3, [scales] * 3), "weight is a pair"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            function()


def test_strided_scales_of_one_group():
    words = torch.randint(-(2**31), 2**31, (2, 64, 8), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    scales = weights(1, 64, 2).permute(2, 1, 0)
    made = QuantizedExperts.from_mlx(words, scales, scales)
    assert torch.equal(
        made.dequantize(), QuantizedExperts.from_mlx(words, *[scales.clone().contiguous()] * 2).dequantize()
    )


def test_arguments_that_are_not_the_callers():
    w1, w2 = quantize(weights(3, 64, 64)), quantize(weights(3, 64, 32), group_size=32)
    x = weights(5, 64)
    for name in ("trellis_w1", "codes", "w1_shape", "nonsense"):
        with pytest.raises(TypeError, match=f"fused_experts: got an unexpected keyword argument '{name}'"):
            metal_moe.fused_experts(x, w1, w2, *routes(5), **{name: True})
    with pytest.raises(TypeError, match="fused_experts: too many positional arguments"):
        metal_moe.fused_experts(x, w1, w2, *routes(5), *range(20))


def mixed_layer() -> tuple[tuple, dict]:
    """Dense shared experts beside quantised ones."""
    routed = (quantize(weights(3, 64, 64)), quantize(weights(3, 64, 32), group_size=32))
    return routed, {"shared_w1": weights(1, 64, 64, seed=1), "shared_w2": weights(1, 64, 32, seed=2)}


def test_torch_compile_of_dense_experts_beside_quantised_ones(use_engine):
    use_engine("native")  # as the compiled graph, whose tensors are the CPU's
    routed, shared = mixed_layer()
    x = weights(5, 64)
    compiled = torch.compile(
        lambda a: metal_moe.fused_experts(a, *routed, *routes(5), **shared), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), metal_moe.fused_experts(x, *routed, *routes(5), **shared))


def test_fake_tensors_leave_nothing_behind():
    routed = (quantize(weights(3, 64, 128)), quantize(weights(3, 128, 32), group_size=32))
    shared = {"shared_w1": weights(1, 64, 128), "shared_w2": weights(1, 128, 32)}
    x = weights(5, 128)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x, *routes(5))]
        assert metal_moe.fused_experts(fake[0], *routed, *fake[1:], **shared).shape == (5, 128)
    assert torch.isfinite(metal_moe.fused_experts(x, *routed, *routes(5), **shared)).all()


def test_gradients_of_dense_experts_beside_quantised_ones_are_refused():
    routed, shared = mixed_layer()
    x = weights(5, 64)
    with pytest.raises(RuntimeError, match="fused_experts: w1 requires grad"):
        metal_moe.fused_experts(x, weights(3, 64, 64).requires_grad_(), routed[1], *routes(5))
    shared["shared_w2"].requires_grad_()
    with pytest.raises(RuntimeError, match="fused_experts: shared_w2 requires grad"):
        metal_moe.fused_experts(x, *routed, *routes(5), **shared)
    with torch.no_grad():
        metal_moe.fused_experts(x, *routed, *routes(5), **shared)


def trellis_beside_shared() -> tuple[tuple, dict]:
    trellis = (quantize(weights(4, 64, 128, seed=s), format="trellis", bits=8).parts["weight"] for s in (0, 1))
    w1 = QuantizedExperts(dict(zip(("gate", "up"), trellis, strict=True)))
    w2 = quantize(weights(4, 128, 64, seed=2))
    return (w1, w2), {"shared_w1": quantize(weights(1, 128, 128, seed=3)), "shared_w2": quantize(weights(1, 128, 64))}


def test_shared_experts_beside_trellis_in_a_batch():
    """They run apart, and PyTorch adds up the results: of a batch too, when both are there."""
    routed, shared = trellis_beside_shared()
    x, logits = weights(9, 128), weights(9, 4, seed=1)
    expected = metal_moe.fused_moe(x, *routed, logits, 2, **shared)
    with metal_moe.LayerBatch():
        got = metal_moe.fused_moe(x, *routed, logits, 2, **shared)
    assert torch.equal(got, expected)
    stream = metal_moe.CommandStream("cpu")
    with stream:
        got = metal_moe.fused_moe(x, *routed, logits, 2, **shared)
    stream.commit()
    stream.synchronize()
    assert torch.equal(got, expected)


def test_shared_experts_with_a_bias_are_refused_beside_trellis():
    routed, shared = trellis_beside_shared()
    shared["shared_w1"] = quantize(weights(1, 128, 128), bias=torch.zeros(1, 128))
    for call in (metal_moe.fused_experts, metal_moe.fused_moe):
        routing = routes(9) if call is metal_moe.fused_experts else (weights(9, 4), 1)
        with pytest.raises(ValueError, match="shared_w1 is with a bias"):
            call(weights(9, 128), *routed, *routing, **shared)


def test_trellis_that_cannot_be_taken_apart():
    w1 = quantize(weights(2, 128, 128), format="trellis")
    with pytest.raises(ValueError, match="fused_experts: w1: rows 0 to 64"):
        metal_moe.fused_experts(weights(2, 128), w1, quantize(weights(2, 128, 64)), *routes(2))


@pytest.mark.parametrize("settings", [{"format": "mxfp4"}, {"group_size": 32}, {"format": "dense"}])
def test_files_of_one_expert_are_aligned(settings, tmp_path):
    """Whatever the sizes of its buffers are."""
    pair = {
        name: quantize(weights(1, 5, 32, seed=s), **settings).parts["weight"] for s, name in enumerate(("gate", "up"))
    }
    w1, w2 = QuantizedExperts(pair), quantize(weights(1, 32, 5), format="dense")
    w1.save(tmp_path / "w1.safetensors")
    loaded, x = QuantizedExperts.load(tmp_path / "w1.safetensors"), weights(2, 32)
    assert loaded.aligned() is loaded
    expected = metal_moe.fused_experts(x, w1, w2, *routes(2))
    assert torch.equal(metal_moe.fused_experts(x, loaded, w2, *routes(2)), expected)
