"""Calls with quantised weights like an earlier one: with the same results, and never with weights of before."""

import functools
import gc
import weakref

import cases
import metal_moe
import pytest
import torch
from metal_moe import QuantizedExperts

OWN_DEVICE = True
H, WIDTH, E, K = 128, 64, 4, 2

# Without DLPack's exchange interface every call is checked: correct, and not what this file is about.
pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="PyTorch before 2.10: every call is checked"
)


def assert_close(out: torch.Tensor, expected, about: object = "") -> None:
    cases.assert_close(out, expected, about, cases.ROUNDING[out.dtype])


FORMATS = {
    "affine": {"format": "affine", "bits": 4, "group_size": 32},
    "gate and up": {"format": "affine", "bits": {"gate": 6, "up": 2}},
    "mxfp4": {"format": "mxfp4"},
    "dense": {"format": "dense"},
    "trellis": {"format": "trellis", "bits": 2},
}


@functools.cache
def on_the_cpu(name: str, which: str, width: int, seed: int) -> QuantizedExperts:
    layer = cases.make_layer(1, H, width, E, K, seed=seed)
    settings = dict(FORMATS[name])
    if which == "w1" and name == "trellis":
        gate, up = layer.w1.chunk(2, 1)
        return QuantizedExperts.quantize({"gate": gate, "up": up}, **settings)
    if which == "w2" and name == "gate and up":
        settings["bits"] = 3
    return QuantizedExperts.quantize(getattr(layer, which), **settings)


def weights(name: str, which: str, width: int = WIDTH, seed: int = 0, bias: torch.Tensor | None = None):
    """New weights that no call has had."""
    made = on_the_cpu(name, which, width, seed)
    parts = {
        key: type(part)(part.codes.clone(), part.scales, part.biases, part.table).to(cases.DEVICE)
        for key, part in made.parts.items()
    }
    return QuantizedExperts(parts, bias)


class Calls:
    """Both operations on one layer."""

    def __init__(self, tokens: int, w1, w2, **options) -> None:
        layer = cases.make_layer(tokens, H, WIDTH, E, K)
        self.x = layer.hidden_states.to(cases.DEVICE)
        self.w1, self.w2, self.options = w1, w2, options
        self.logits = torch.randn(tokens, E, generator=torch.Generator().manual_seed(7)).to(cases.DEVICE)
        self.routes = metal_moe.fused_topk(self.logits, K)

    def fused_experts(self, **more) -> torch.Tensor:
        return metal_moe.fused_experts(self.x, self.w1, self.w2, *self.routes, **self.options, **more)

    def fused_moe(self, **more) -> torch.Tensor:
        return metal_moe.fused_moe(self.x, self.w1, self.w2, self.logits, K, **self.options, **more)

    def reference(self):
        def dense(value):
            return value.dequantize(torch.float64) if isinstance(value, QuantizedExperts) else value

        options = {name: dense(value) for name, value in self.options.items()}
        for name in ("w1", "w2"):
            own = getattr(getattr(self, name), "bias", None)
            if own is not None:
                options[f"{name}_bias"] = own
        return cases.reference.experts(self.x, dense(self.w1), dense(self.w2), *self.routes, **options)


def make_calls(tokens: int = 3, name: str = "affine", **options) -> Calls:
    return Calls(tokens, weights(name, "w1"), weights(name, "w2"), **options)


OPERATIONS = ["fused_experts", "fused_moe"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_second_call_is_not_checked(checks, operation, tokens, name):
    calls = make_calls(tokens, name)
    run = getattr(calls, operation)
    first = run()
    assert_close(first, calls.reference(), name)
    assert checks == [operation]
    ran = metal_moe.last_dispatch()
    assert ran["operation"] == operation and ran["specialization"]
    for _ in range(3):
        assert torch.equal(run(), first)
        assert metal_moe.last_dispatch() == ran
    assert checks == [operation]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("same", [True, False])
def test_shared_experts_and_a_bias_of_the_weights(checks, operation, same):
    """Shared experts are part of the dispatch: kernels are compiled for their format where all have the same."""
    bias = torch.randn(E, 2 * WIDTH, generator=torch.Generator().manual_seed(3)).to(cases.DEVICE)
    shared = "affine" if same else "mxfp4"
    options = {"shared_w1": weights(shared, "w1", 32, 5), "shared_w2": weights(shared, "w2", 32, 5)}
    calls = Calls(5, weights("affine", "w1", bias=bias), weights("affine", "w2"), **options)
    run = getattr(calls, operation)
    first = run()
    ran = metal_moe.last_dispatch()
    assert bool(ran["specialization"]) == same
    assert_close(first, calls.reference())
    checks.clear()
    assert torch.equal(run(), first) and metal_moe.last_dispatch() == ran and checks == []
    calls.w1.bias = bias + 1
    assert_close(run(), calls.reference())
    calls.w1.bias = None
    assert_close(run(), calls.reference())
    with pytest.raises(ValueError, match="w1_bias is given; it must be None where w1 has a bias of its own"):
        calls.w1.bias = bias
        run(w1_bias=bias)


@pytest.mark.parametrize("w1", ["affine", "trellis", "a tensor"])
@pytest.mark.parametrize("w2", ["mxfp4", "trellis", "a tensor"])
def test_mixtures(checks, w1, w2):
    layer = cases.make_layer(3, H, WIDTH, E, K).to(cases.DEVICE)
    for tokens in (1, 3):
        calls = Calls(
            tokens,
            layer.w1 if w1 == "a tensor" else weights(w1, "w1"),
            layer.w2 if w2 == "a tensor" else weights(w2, "w2"),
        )
        first = calls.fused_experts()
        assert_close(first, calls.reference())
        checks.clear()
        assert torch.equal(calls.fused_experts(), first) and checks == []


@pytest.mark.parametrize("name", ["affine", "trellis"])
def test_other_weights_of_the_same_shape(checks, name):
    """Known by their sizes, computed with their own contents; those of before may be gone."""
    results = []
    for seed in (0, 1, 0, 1):
        calls = Calls(2, weights(name, "w1", seed=seed), weights(name, "w2", seed=seed))
        calls.fused_experts()  # the first with this object makes its form
        checks.clear()
        results.append(calls.fused_experts())
        assert checks == []
        assert_close(results[-1], calls.reference(), f"{name} {seed}")
        gone = weakref.ref(calls.w1)
        del calls
        gc.collect()
        assert gone() is None, "nothing is remembered but sizes"
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])


def test_weights_that_change_in_place():
    calls = make_calls()
    for _ in range(2):
        calls.fused_experts()
    codes = calls.w2.parts["weight"].codes
    before = calls.fused_experts()
    codes.bitwise_xor_(0x55)
    assert_close(calls.fused_experts(), calls.reference())
    codes.set_(codes.clone().bitwise_xor_(0x55).untyped_storage())  # another memory, as unloading and loading does
    assert torch.equal(calls.fused_experts(), before)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_parts_that_are_replaced(operation):
    calls = make_calls()
    run = getattr(calls, operation)
    for _ in range(2):
        run()
    for name in ("mxfp4", "affine"):  # another format, other contents
        calls.w1.parts["weight"] = weights(name, "w1", seed=2).parts["weight"]
        for _ in range(2):
            assert_close(run(), calls.reference(), name)
    for small in (weights("affine", "w1", 32), weights("affine", "w2")):
        kept = calls.w1.parts["weight"]
        calls.w1.parts["weight"] = small.parts["weight"]
        for _ in range(2):
            with pytest.raises(ValueError, match="w1 is of parts that were replaced by those of"):
                run()
        calls.w1.parts["weight"] = kept
        assert_close(run(), calls.reference())


def test_a_parts_buffers_are_not_replaced():
    part = weights("affine", "w1").parts["weight"]
    for name in ("codes", "table", "rows"):
        with pytest.raises(AttributeError, match=f"Part.{name} does not change; make another part"):
            setattr(part, name, getattr(part, name))


def test_sizes_that_only_the_shape_tells_apart():
    """Gate and up of [E, 64, 128] and of [E, 128, 64], with codes, scales and tables of as many bytes."""
    calls = make_calls()
    narrow = cases.make_layer(3, H // 2, 2 * WIDTH, E, K).to(cases.DEVICE)
    turned = QuantizedExperts.quantize(narrow.w1, **FORMATS["affine"])
    for _ in range(2):
        calls.fused_experts()
        metal_moe.fused_experts(narrow.hidden_states, turned, narrow.w2, *calls.routes)
    one, other = turned.gate_up()[0], calls.w1.gate_up()[0]
    assert [b.shape for b in one.buffers().values()] == [b.shape for b in other.buffers().values()]
    right, calls.w1 = calls.w1, turned
    for _ in range(2):
        with pytest.raises(ValueError, match=r"w1 has shape \(4, 256, 64\)"):
            calls.fused_experts()
    calls.w1 = right
    assert_close(calls.fused_experts(), calls.reference())


def test_what_is_wrong_stays_an_error():
    pair, trellis = make_calls(name="gate and up"), make_calls(name="trellis")
    shared = {"shared_w1": weights("affine", "w1", 32, 5), "shared_w2": weights("affine", "w2", 32, 5)}
    biased = weights("affine", "w2", 32, 5, bias=torch.zeros(E, H, device=cases.DEVICE))
    x = pair.x
    for calls in (pair, trellis):
        calls.fused_experts()
    pair.fused_experts(**shared)
    wrong = [
        ("interleaved is True", lambda: pair.fused_experts(interleaved=True)),
        ("a pair of gate and up", lambda: pair.fused_experts(activation="relu2")),
        ("kernel is 'moe_none'", lambda: trellis.fused_experts(kernel="moe_none")),
        ("with a bias", lambda: pair.fused_experts(shared_w1=shared["shared_w1"], shared_w2=biased)),
        ("w1 has shape", lambda: metal_moe.fused_experts(x[:, :64].contiguous(), pair.w1, pair.w2, *pair.routes)),
    ]
    for message, call in wrong:
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                call()
        pair.fused_experts(**shared)
    own = make_calls()
    own.w1.bias = torch.zeros(E, 2 * WIDTH, device=cases.DEVICE)
    own.fused_experts()
    own.w1.bias.requires_grad_()
    with pytest.raises(RuntimeError, match="w1_bias requires grad"):
        own.fused_experts()


def test_shared_experts_beside_trellis_and_dense_ones(checks):
    """What Python puts together at every call."""
    layer = cases.make_layer(3, H, 32, 2, 1).to(cases.DEVICE)
    for name in ("trellis", "affine"):
        calls = make_calls(3, name, shared_w1=layer.w1, shared_w2=layer.w2)
        first = calls.fused_experts()
        assert_close(first, calls.reference(), name)
        assert torch.equal(calls.fused_experts(), first)


def test_rows_that_kernels_cannot_read():
    calls = make_calls(1)
    x, expected = calls.x, calls.fused_experts()
    memory = torch.zeros(H + 4, device=cases.DEVICE)
    for offset in (0, 1, 4, 2):
        calls.x = memory[offset : offset + H].view(1, H).copy_(x)
        metal_moe.reset_counters()
        assert torch.equal(calls.fused_experts(), expected)
        assert metal_moe.counters()["fallbacks"]["copied_input"] == (offset % 4 != 0)


def test_specialisation_may_be_turned_off(checks):
    calls = make_calls()
    calls.fused_experts()
    checks.clear()
    metal_moe.set_specialization(False)
    try:
        result = calls.fused_experts()
        assert metal_moe.last_dispatch()["specialization"] == ""
    finally:
        metal_moe.set_specialization(True)
    assert_close(result, calls.reference())
    assert checks == []


def test_a_subclass_takes_the_ordinary_way(checks):
    class Marked(QuantizedExperts):
        pass

    calls = make_calls()
    calls.fused_experts()
    calls.w1 = Marked(calls.w1.parts)
    for _ in range(2):
        assert_close(calls.fused_experts(), calls.reference())
    assert len(checks) == 3


@pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="PyTorch commits on this device")
def test_what_a_batch_reads_stays():
    """Weights that lose their parts and bias before the batch is run."""
    calls = make_calls(3)
    calls.w1.bias = torch.randn(E, 2 * WIDTH)
    expected = calls.fused_experts()
    with metal_moe.LayerBatch(100):
        results = [calls.fused_experts() for _ in range(3)]
        gone = weakref.ref(calls.w1.parts["weight"])
        calls.w1.bias = None
        calls.w1.kernel_forms.clear()
        calls.w1 = calls.w2 = None
        gc.collect()
        filled = [torch.full((n,), 0xFF, dtype=torch.uint8) for n in (256, 2048, 16384, 32768) for _ in range(20)]
    assert filled and all(torch.equal(result, expected) for result in results)
    gc.collect()
    assert gone() is None


def test_threads_with_weights_of_their_own():
    all_calls = [make_calls(3, name) for name in ("affine", "mxfp4", "dense", "affine")]
    all_calls[3].w1.bias = torch.randn(E, 2 * WIDTH).to(cases.DEVICE)
    cases.check_in_threads([calls.fused_experts for calls in all_calls])
