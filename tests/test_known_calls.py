"""Calls like an earlier one skip the checks (csrc/bindings/known_calls.cpp): with the same results, and only those."""

import cases
import metal_moe
import pytest
import torch
from cases import assert_close
from metal_moe import _core
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

OWN_DEVICE = True
T, H, WIDTH, E, K = 3, 24, 16, 6, 2

# Without DLPack's exchange interface every call is checked: correct, and not what this file is about.
pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="PyTorch before 2.10: every call is checked"
)


def make_layer(*sizes, **options):
    return cases.make_layer(*sizes, **options).to(cases.DEVICE)


def calls(layer, **overrides):
    """The layer as a function per operation."""
    logits = torch.randn(layer.hidden_states.shape[0], E, generator=torch.Generator().manual_seed(7)).to(cases.DEVICE)

    def fused_moe(**more):
        options = {**layer.options, **overrides, **more}
        return metal_moe.fused_moe(layer.hidden_states, layer.w1, layer.w2, logits, K, **options)

    return {"fused_experts": lambda **more: layer.run(**overrides, **more), "fused_moe": fused_moe}


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("operation", ["fused_experts", "fused_moe"])
def test_the_second_call_is_not_checked(checks, operation, tokens):
    # A size of its own per test: what earlier tests have called is known already.
    layer = make_layer(tokens, 88, 40, E, K, bias=True, shared=1, shared_weights=True)
    run = calls(layer)[operation]
    first = run()
    assert checks == [operation]
    assert metal_moe.last_dispatch()["operation"] == operation
    kernels = metal_moe.last_dispatch()["kernels"]
    for _ in range(3):
        assert torch.equal(run(), first)
        assert metal_moe.last_dispatch()["operation"] == operation
        assert metal_moe.last_dispatch()["kernels"] == kernels
    assert checks == [operation]


CHANGES = {
    "activation": {"activation": "gelu"},
    "interleaved": {"interleaved": True},
    "alpha": {"alpha": 1.5},
    "limit": {"limit": 6.0},
    "use_fp32_acc": {"use_fp32_acc": False},
    "kernel": {"kernel": "moe_base"},
    "no bias": {"w1_bias": None},
    "no shared weights": {"shared_weights": None},
}


@pytest.mark.parametrize("operation", ["fused_experts", "fused_moe"])
@pytest.mark.parametrize("change", CHANGES)
def test_other_options_are_another_call(checks, change, operation):
    hidden = 104 + 8 * list(CHANGES).index(change)  # a size of its own, as above
    options = {"bias": True, "shared": 1, "shared_weights": True, "activation": "swiglu_clamp"}
    layer = make_layer(2, hidden, 24, E, K, torch.float16, **options)
    run = calls(layer)[operation]
    plain, changed = run(), run(**CHANGES[change])
    assert checks == [operation, operation]
    checks.clear()
    for _ in range(3):
        assert torch.equal(run(), plain)
        assert torch.equal(run(**CHANGES[change]), changed)
    assert checks == []
    if operation == "fused_experts":
        options = {**layer.options, **CHANGES[change]}
        other = cases.Layer(layer.hidden_states, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids, options)
        assert_close(changed, other.reference(), f"{other}")


def test_routing_options_are_part_of_a_call():
    layer = make_layer(T, H, WIDTH, E, K)
    run = calls(layer)["fused_moe"]
    options = [
        {},
        {"scoring": "sigmoid"},
        {"scoring": "sigmoid", "renormalize_epsilon": 0.5},
        {"renormalize": False},
        {"routed_scaling_factor": 1.8},
        {"correction_bias": torch.linspace(-1, 1, E, device=cases.DEVICE)},
        {"num_expert_group": 3, "topk_group": 1},
        {"num_expert_group": 3, "topk_group": 2},
        {"num_expert_group": 3, "topk_group": 2, "group_score": "top2_sum"},
    ]
    first = [run(**given) for given in options]
    for _ in range(2):
        for given, result in zip(options, first, strict=True):
            assert torch.equal(run(**given), result)
    # Nothing of the above was mistaken for another: their routes by themselves, then their experts.
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(7)).to(cases.DEVICE)
    for given, result in zip(options, first, strict=True):
        weights, ids = metal_moe.fused_topk(logits, K, **given)
        expected = cases.Layer(layer.hidden_states, layer.w1, layer.w2, weights, ids).reference()
        assert_close(result, expected, f"{given}")


def test_other_tensors_are_another_call(checks):
    """Shapes, strides and dtypes, each a call that is checked once and computed right."""
    layer = make_layer(4, 56, 32, E, K)
    strided = torch.zeros(8, 70, device=cases.DEVICE)[::2, 7:63].copy_(layer.hidden_states)
    columns = layer.topk_weights.t().contiguous().t()
    variants = [
        layer,
        cases.Layer(strided, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids),
        cases.Layer(layer.hidden_states, layer.w1, layer.w2, columns, layer.topk_ids),
        cases.Layer(layer.hidden_states, layer.w1, layer.w2, layer.topk_weights.half(), layer.topk_ids),
        cases.Layer(layer.hidden_states, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids.long()),
        cases.Layer(layer.hidden_states[:3], layer.w1, layer.w2, layer.topk_weights[:3], layer.topk_ids[:3]),
        cases.Layer(layer.hidden_states, layer.w1[:4], layer.w2[:4], layer.topk_weights, layer.topk_ids),
    ]
    for _ in range(3):
        for variant in variants:
            assert_close(variant.run(), variant.reference(), f"{variant}")
    assert len(checks) == len(variants)


def test_memory_that_is_freed_and_used_again():
    """Nothing is remembered by address: new tensors of any shape in old places."""
    for round in range(40):
        hidden, experts = (32, 4) if round % 2 else (16, 8)  # of w1 and w2 the same number of bytes
        layer = make_layer(1 + round % 3, hidden, 16, experts, 2, seed=round)
        assert_close(layer.run(), layer.reference(), f"{round}: {layer}")
        del layer


def test_alignment_is_looked_at_in_every_call():
    layer = make_layer(1, 64, 32, E, K)
    memory = torch.zeros(64 + 4, device=cases.DEVICE)
    expected = layer.run()
    for offset in (0, 1, 0, 3, 4):
        x = memory[offset : offset + 64].view(1, 64).copy_(layer.hidden_states)
        moved = cases.Layer(x, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids)
        assert_close(moved.run(), layer.reference(), f"offset {offset}")
        assert metal_moe.last_dispatch()["vectorized"] == (offset % 4 == 0)
        if offset % 4 == 0:
            assert torch.equal(moved.run(kernel="moe_simd"), moved.run(kernel="moe_simd"))
        else:
            with pytest.raises(ValueError, match="kernel is 'moe_simd', but hidden_states has rows"):
                moved.run(kernel="moe_simd")
    assert torch.equal(layer.run(), expected)


def test_what_is_wrong_stays_an_error():
    layer = make_layer(T, H, WIDTH, E, K)
    x, w1, w2, weights, ids = layer.hidden_states, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids
    call = metal_moe.fused_experts
    clamp = {"activation": "swiglu_clamp"}
    for _ in range(2):
        call(x, w1, w2, weights, ids, limit=1e-50, **clamp)  # 0 in float32, and allowed
        call(x, w1, w2, weights, ids, limit=float("inf"), **clamp)
        call(x, w1, w2, weights, ids)
    wrong = [
        (TypeError, "w1 is torch.float16", lambda: call(x, w1.half(), w2, weights, ids)),
        (TypeError, "topk_ids is torch.float32", lambda: call(x, w1, w2, weights, ids.float())),
        (TypeError, "hidden_states is of type list", lambda: call(x.tolist(), w1, w2, weights, ids)),
        (TypeError, "alpha is True", lambda: call(x, w1, w2, weights, ids, alpha=True)),
        (TypeError, "interleaved is 0", lambda: call(x, w1, w2, weights, ids, interleaved=0)),
        (TypeError, "missing .* 'topk_ids'", lambda: call(x, w1, w2, weights)),
        (TypeError, "unexpected keyword argument 'gate'", lambda: call(x, w1, w2, weights, ids, gate=1)),
        (TypeError, "multiple values for argument 'w1'", lambda: call(x, w1, w2, weights, ids, w1=w1)),
        (TypeError, "takes 5 positional", lambda: call(x, w1, w2, weights, ids, "silu")),
        (ValueError, "w1 is strided", lambda: call(x, w1.mT.contiguous().mT, w2, weights, ids)),
        (ValueError, "topk_weights has shape", lambda: call(x, w1, w2, weights, ids[:, :1])),
        (ValueError, "activation is 'swish'", lambda: call(x, w1, w2, weights, ids, activation="swish")),
        (ValueError, "kernel is 'moe_none'", lambda: call(x, w1, w2, weights, ids, kernel="moe_none")),
        (ValueError, "limit is 0.0", lambda: call(x, w1, w2, weights, ids, limit=0.0, **clamp)),
        (
            ValueError,
            "limit is 1e\\+300",
            lambda: call(x, w1, w2, weights, ids, limit=1e300, **clamp),
        ),
        (ValueError, "on device meta", lambda: call(x, w1, w2, weights, ids.to("meta"))),
        (RuntimeError, "w1 requires grad", lambda: call(x, w1.clone().requires_grad_(), w2, weights, ids)),
    ]
    for error, message, function in wrong:
        for _ in range(2):
            with pytest.raises(error, match=message):
                function()
        call(x, w1, w2, weights, ids)


def test_arguments_by_name():
    layer = make_layer(T, H, WIDTH, E, K)
    expected = layer.run()
    named = {
        "topk_ids": layer.topk_ids,
        "topk_weights": layer.topk_weights,
        "w2": layer.w2,
        "w1": layer.w1,
        "hidden_states": layer.hidden_states,
    }
    for _ in range(2):
        assert torch.equal(metal_moe.fused_experts(**named), expected)
        assert torch.equal(metal_moe.fused_experts(**named, activation="silu", kernel=None), expected)


def test_negated_views_hold_their_values():
    layer = make_layer(T, H, WIDTH, E, K)
    x = layer.hidden_states
    layer.run()
    negated = torch._neg_view(x.neg())
    assert negated.is_neg()
    for _ in range(2):
        moved = cases.Layer(negated, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids)
        assert torch.equal(moved.run(), layer.run())


@pytest.mark.parametrize("operation", ["fused_experts", "fused_moe"])
def test_whoever_must_see_the_operator_does(operation):
    layer = make_layer(T, H, WIDTH, E, K)
    run = calls(layer)[operation]
    expected = run()
    assert torch.equal(run(), expected)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    with Seen():
        assert torch.equal(run(), expected)
    assert f"metal_moe.{operation}.default" in names

    graph = make_fx(lambda x: run() + x)(layer.hidden_states)
    assert [str(n.target) for n in graph.graph.nodes].count(f"metal_moe.{operation}.default") == 1

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert f"metal_moe::{operation}" in [event.name for event in profile.events()]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), expected)

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append("function")
            return super().__torch_function__(function, types, args, kwargs or {})

    marked = layer.hidden_states.as_subclass(Marked)
    metal_moe.fused_experts(marked, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids)
    assert names[-1] == "function"


def test_modes_of_autograd():
    layer = make_layer(T, H, WIDTH, E, K)
    expected = layer.run()
    weights = torch.nn.Parameter(layer.w1)
    moved = cases.Layer(layer.hidden_states, weights, layer.w2, layer.topk_weights, layer.topk_ids)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                out = moved.run()
                assert torch.equal(out, expected)
                assert out.is_inference() == (mode is torch.inference_mode)
    with pytest.raises(RuntimeError, match="w1 requires grad"):
        moved.run()
    weights.requires_grad_(False)
    assert torch.equal(moved.run(), expected)


def test_threads_with_layers_of_their_own():
    layers = [
        make_layer(1, H, WIDTH, E, K, seed=1),
        make_layer(1, H, WIDTH, E, K, seed=2, activation="gelu"),
        make_layer(5, 40, 24, 4, 3, torch.bfloat16, seed=3, shared=1),
        make_layer(1, H, WIDTH, E, K, seed=4, kernel="moe_base"),
    ]
    results = cases.check_in_threads([layer.run for layer in layers])
    for layer, result in zip(layers, results, strict=True):
        assert_close(result, layer.reference(), f"{layer}")


def test_few_calls_are_remembered(checks):
    """A prompt of each length is a call of its own: what is remembered is bounded, and comes back after one call."""
    decode = make_layer(1, 8, 8, 2, 1)
    decode.run()
    for tokens in range(1, 700):
        cases.Layer(
            decode.hidden_states.expand(tokens, 8),
            decode.w1,
            decode.w2,
            decode.topk_weights.expand(tokens, 1),
            decode.topk_ids.expand(tokens, 1),
        ).run()
        assert 0 < _core.known_call_count() <= 512
    assert len(checks) >= 699
    checks.clear()
    for _ in range(3):
        assert_close(decode.run(), decode.reference(), "decode")
    assert len(checks) <= 1


def test_engines_are_told_apart(use_engine, checks):
    use_engine("native")
    layer = cases.make_layer(T, H, WIDTH, E, K)
    expected = layer.reference()
    for engine in ("native", "exact", "native", "exact"):
        use_engine(engine)
        for _ in range(2):
            assert_close(layer.run(), expected, engine)
            assert metal_moe.last_dispatch()["engine"] == engine
