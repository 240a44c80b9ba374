"""The operators as PyTorch sees them: schema and fake implementations, compiled graphs, modes, threads, gradients."""

import sys
import threading
import time

import cases
import metal_moe
import pytest
import torch
from cases import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

OWN_DEVICE = True
OPERATORS = ["fused_experts", "fused_moe", "fused_topk", "group_tokens", "gather_experts"]


def make_layer(*sizes, **options):
    return cases.make_layer(*sizes, **options).to(cases.DEVICE)


def samples(tokens=6, dtype=torch.float32, **options):
    """Positional and keyword arguments of every operator."""
    layer = make_layer(tokens, 24, 16, 8, 2, dtype, bias=True, shared=1, shared_weights=True, **options)
    logits = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1)).to(cases.DEVICE)
    experts = (layer.hidden_states, layer.w1, layer.w2)
    routing = {
        "scoring": "sigmoid",
        "correction_bias": torch.linspace(-0.1, 0.1, 8, device=cases.DEVICE),
        "routed_scaling_factor": 1.8,
    }
    return {
        "fused_experts": ((*experts, layer.topk_weights, layer.topk_ids), layer.options),
        "fused_moe": ((*experts, logits, 2), {**routing, **layer.options}),
        "fused_topk": ((logits, 2), {**routing, "num_expert_group": 4, "topk_group": 2, "group_score": "top2_sum"}),
        "group_tokens": ((layer.topk_ids, 8, 4, 1, 5), {}),
        "gather_experts": ((layer.w1, layer.topk_ids[:, 0]), {}),
    }


def call(name, args, kwargs):
    """Through the public function, where it has its own signature."""
    if name == "group_tokens":
        ids, experts, row_tile, shared, capacity = args
        return tuple(metal_moe.group_tokens(ids, experts, row_tile=row_tile, shared_experts=shared, capacity=capacity))
    return getattr(metal_moe, name)(*args, **kwargs)


def flat(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, tokens):
    args, kwargs = samples(tokens)[name]
    torch.library.opcheck(getattr(torch.ops.metal_moe, name), args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["fused_experts", "fused_moe"])
def test_opcheck_of_half_types_and_strides(name, dtype):
    args, kwargs = samples(5, dtype, activation="swiglu_clamp", interleaved=True)[name]
    wide = torch.zeros(10, 40, dtype=dtype, device=cases.DEVICE)
    view = wide[::2, 3:27].copy_(args[0])
    torch.library.opcheck(getattr(torch.ops.metal_moe, name), (view, *args[1:]), kwargs)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_and_function_agree(name):
    args, kwargs = samples()[name]
    expected = flat(call(name, args, kwargs))
    got = flat(getattr(torch.ops.metal_moe, name)(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 6, 20, 40])
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_have_the_real_shapes(name, tokens):
    args, kwargs = samples(tokens, torch.bfloat16)[name]
    real = flat(call(name, args, kwargs))
    before = metal_moe.last_dispatch()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake_kwargs = {k: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
        fake = flat(call(name, fake_args, fake_kwargs))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    assert metal_moe.last_dispatch() == before, "a fake call must not run kernels"


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_tensors(name):
    args, kwargs = samples()[name]
    real = flat(call(name, args, kwargs))
    meta_args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    meta_kwargs = {k: a.to("meta") if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
    for a, b in zip(flat(call(name, meta_args, meta_kwargs)), real, strict=True):
        assert a.device.type == "meta" and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


class Block(torch.nn.Module):
    """An MoE block as a model has it: router, experts, residual."""

    def __init__(self, layer):
        super().__init__()
        self.gate = torch.nn.Linear(layer.hidden_states.shape[1], layer.w1.shape[0], bias=False)
        self.w1, self.w2 = (torch.nn.Parameter(w, requires_grad=False) for w in (layer.w1, layer.w2))
        self.gate.requires_grad_(False)

    def forward(self, x):
        weights, ids = metal_moe.fused_topk(self.gate(x), 2, scoring="sigmoid")
        y = metal_moe.fused_experts(x * 1.5, self.w1, self.w2, weights, ids)
        return x + y + metal_moe.fused_moe(x, self.w1, self.w2, self.gate(x), 2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, dynamic):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = make_layer(6, 24, 16, 8, 2)
    block = Block(layer).to(cases.DEVICE)
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens in (6, 1, 33):
        x = torch.randn(tokens, 24, device=cases.DEVICE)
        assert torch.equal(compiled(x), block(x))


def test_compile_group_and_gather():
    torch._dynamo.reset()

    def run(ids, weights):
        groups = metal_moe.group_tokens(ids, 8, row_tile=4, shared_experts=1, capacity=5)
        return groups.offsets + 1, groups.padded, metal_moe.gather_experts(weights, ids[:, 0])

    ids = torch.randint(0, 8, (7, 2), generator=torch.Generator().manual_seed(0)).to(cases.DEVICE)
    weights = torch.randn(8, 3, 5, device=cases.DEVICE)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(ids, weights), run(ids, weights), strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_one_node_in_a_traced_graph(name):
    args, kwargs = samples()[name]
    tensors = {f"arg{i}": a for i, a in enumerate(args) if isinstance(a, torch.Tensor)}

    def run(*values):
        given = iter(values)
        return call(name, [next(given) if isinstance(a, torch.Tensor) else a for a in args], kwargs)

    graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors.values())
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert getattr(torch.ops.metal_moe, name).default in targets
    expected = flat(call(name, args, kwargs))
    assert all(torch.equal(a, b) for a, b in zip(flat(graph(*tensors.values())), expected, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_modes(name, mode):
    args, kwargs = samples()[name]
    expected = flat(call(name, args, kwargs))
    with mode():
        inputs = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        got = flat(call(name, inputs, kwargs))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_parameters_that_require_grad():
    """Refused where a gradient would silently be lost; fine where none is recorded."""
    layer = make_layer(3, 24, 16, 4, 2)
    layer.w1 = torch.nn.Parameter(layer.w1)
    with pytest.raises(RuntimeError, match="w1"):
        layer.run()
    with torch.no_grad():
        assert_close(layer.run(), layer.reference(), layer)
    with torch.inference_mode():
        assert_close(layer.run(), layer.reference(), layer)


def test_dispatch_and_function_modes_see_the_operator():
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    layer = make_layer(3, 24, 16, 4, 2)
    expected = layer.run()

    class Dispatch(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen = (*self.seen, func)
            return func(*args, **(kwargs or {}))

    with Dispatch() as mode:
        assert torch.equal(layer.run(), expected)
    assert torch.ops.metal_moe.fused_experts.default in mode.seen

    class Function(TorchFunctionMode):
        seen = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen = (*self.seen, func)
            return func(*args, **(kwargs or {}))

    with Function() as mode:
        result = layer.run()
    assert torch.equal(result, expected)
    assert torch.ops.metal_moe.fused_experts.default in mode.seen


def test_profiler_shows_the_operator():
    layer = make_layer(3, 24, 16, 4, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer.run()
    assert "metal_moe::fused_experts" in {event.key for event in profile.key_averages()}


def test_inputs_are_not_modified_and_outputs_are_new():
    for name, (args, kwargs) in samples(20, torch.bfloat16).items():
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        before = [t.clone() for t in tensors]
        results = flat(call(name, args, kwargs))
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        assert not any(result.untyped_storage().data_ptr() in storages for result in results), name


@pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="a call returns before the kernels run")
def test_other_threads_run_python_meanwhile():
    """The GIL is free while kernels run: a counter in another thread advances far during a long call.

    Nobody is asked to give the GIL away: what a call does not let go of, the counter does not get. It gives way itself
    after each count. On a busy machine it may have no core during a call, so there are several.
    """
    layer = make_layer(1024, 512, 512, 8, 4, torch.bfloat16)
    layer.run()
    done, counts, most = threading.Event(), [0], 0

    def count():
        while not done.is_set():
            counts[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    thread = threading.Thread(target=count)
    try:
        thread.start()
        for _ in range(20):
            before = counts[0]
            layer.run()
            most = max(most, counts[0] - before)
            if most > 20:  # where PyTorch lets go of it for a moment it is a few
                break
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert most > 20


def test_state_is_per_thread():
    """`last_dispatch` is the calling thread's."""
    make_layer(1, 24, 16, 4, 2).run()
    seen = []
    thread = threading.Thread(
        target=lambda: (make_layer(40, 24, 16, 4, 2).run(kernel="moe_base"), seen.append(metal_moe.last_dispatch()))
    )
    thread.start()
    thread.join()
    assert seen[0]["family"].startswith("moe_base")
    assert metal_moe.last_dispatch()["family"].startswith("moe_decode")
