"""LayerBatch: when it commits, what is there afterwards, and what nesting, exceptions and threads do."""

import gc
import threading
import weakref

import cases
import metal_moe
import pytest
import torch
from cases import make_layer

OWN_DEVICE = True
on_cpu = pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="PyTorch commits on this device")

LAYERS = 19


@pytest.fixture(params=["native", "exact"])
def engine(request, use_engine):
    if cases.DEVICE.type != "cpu":
        pytest.skip("PyTorch commits on this device")
    use_engine(request.param)
    return request.param


def model(tokens: int = 3, layers: int = LAYERS, seed: int = 0) -> list[cases.Layer]:
    return [make_layer(tokens, 32, 24, 4, 2, seed=seed + i).to(cases.DEVICE) for i in range(layers)]


def forward(layers: list[cases.Layer], x: torch.Tensor) -> torch.Tensor:
    """The layers one after the other. Only the last result stays referenced by this function."""
    for layer in layers:
        layer.hidden_states = x
        x = layer.run()
        layer.hidden_states = None
    return x


def commits() -> int:
    return metal_moe.last_dispatch()["commits"]


@on_cpu
@pytest.mark.parametrize("layers", [1, 2, 8, LAYERS, 100])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_results_are_those_of_single_calls(engine, layers, tokens):
    """Bitwise, and with results passed from layer to layer that nobody else holds."""
    stack = model(tokens)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1))
    expected = forward(stack, x)
    batch = metal_moe.LayerBatch(layers)
    with batch:
        y = forward(stack, x)
    assert torch.equal(y, expected)
    stats = batch.stats()
    assert stats == {"layers": LAYERS, "operations": LAYERS, "commits": -(-LAYERS // layers), "passed": 0}
    assert metal_moe.pool_stats()["buffers_in_use"] == 0


@on_cpu
def test_the_whole_chain_of_operations(engine):
    """Routing, grouping and gathering are part of a layer: what they write is read in the same command buffer."""
    layer = make_layer(5, 32, 24, 4, 2)
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))

    def run():
        weights, ids = metal_moe.fused_topk(logits, 2)
        group = metal_moe.group_tokens(ids, 4, capacity=3)
        gathered = metal_moe.gather_experts(layer.w2, ids[0])
        y = metal_moe.fused_experts(layer.hidden_states, layer.w1, layer.w2, weights, ids)
        z = metal_moe.fused_moe(y, layer.w1, layer.w2, logits, 2)
        return [weights, ids, *group, gathered, y, z]

    expected = run()
    with metal_moe.LayerBatch(2) as batch:
        found = run()
        assert batch.stats() == {"layers": 2, "operations": 6, "commits": 1, "passed": 0}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@on_cpu
@pytest.mark.parametrize("settings", [{"format": "affine", "bits": 4}, {"format": "trellis", "bits": 2}])
def test_quantised_layers(settings):
    """Also where PyTorch copies rows that their kernels cannot read: it must not do so before they are there."""
    layer = make_layer(4, 128, 128, 2, 2)
    w1, w2 = (metal_moe.QuantizedExperts.quantize(w, **settings) for w in (layer.w1, layer.w2))

    def run():
        x = layer.hidden_states
        for _ in range(3):
            x = metal_moe.fused_experts(x, w1, w2, layer.topk_weights, layer.topk_ids)
        gathered = metal_moe.gather_experts(x.new_ones(3, 4 * 129 + 1), torch.tensor([1]))
        rows = torch.as_strided(gathered, (4, 128), (129, 1), 1)
        return x, metal_moe.fused_experts(rows, w1, w2, layer.topk_weights, layer.topk_ids)

    expected = run()
    with metal_moe.LayerBatch(100) as batch:
        found = run()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert batch.stats()["layers"] == 4


@on_cpu
def test_products_inside_a_batch(engine):
    """Small ones are encoded; for one that PyTorch computes, what it reads is waited for."""
    generator = torch.Generator().manual_seed(4)
    layer = make_layer(3, 32, 24, 4, 2)
    w, A, B = (torch.randn(*shape, generator=generator) for shape in ((32, 16), (4, 32), (16, 4)))

    def run():
        x = layer.run()
        y = metal_moe.matmul(x, w, kernel="metal_moe")
        z = metal_moe.lora(x, A, B, 0.5, y)
        return y, z, metal_moe.matmul(z, w.T, kernel="torch"), metal_moe.matmul(z, w.T, kernel="gemv")

    expected = run()
    with metal_moe.LayerBatch() as batch:
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert batch.stats() == {"layers": 1, "operations": 4, "commits": 2, "passed": 0}


@on_cpu
def test_decoding_inside_a_batch_is_not_part_of_it():
    """What Python code reads at once is computed at once, after what the batch holds."""
    layer = make_layer(4, 128, 128, 2, 2)
    w1 = metal_moe.QuantizedExperts.quantize(layer.w1, format="trellis", bits=2)
    expected = w1.dequantize()
    with metal_moe.LayerBatch() as batch:
        y = layer.run()
        assert torch.equal(w1.dequantize(), expected)
        assert torch.isfinite(y).all(), "waited for on the way"
        assert batch.stats()["operations"] == 1


@on_cpu
def test_dispatches_are_not_committed_before_the_layers_are_there():
    stack = model(1, 8)
    with metal_moe.LayerBatch(layers=4):
        seen = []
        x = stack[0].hidden_states
        for layer in stack:
            layer.hidden_states = x
            x = layer.run()
            seen.append(commits())
            assert metal_moe.last_dispatch()["layer_batch"] == "encoded"
    assert seen == [0, 0, 0, 1, 0, 0, 0, 1]
    stack[0].run()
    assert metal_moe.last_dispatch()["layer_batch"] == ""
    assert commits() == 1


@on_cpu
def test_synchronize_makes_results_available():
    first, second = model(3, 2)
    expected = first.run(), second.run()
    with metal_moe.LayerBatch() as batch:
        y = first.run()
        batch.synchronize()
        assert torch.equal(y, expected[0])
        z = second.run()
    assert torch.equal(z, expected[1])
    assert batch.stats()["commits"] == 2


@on_cpu
def test_tensors_live_until_their_work_is_done():
    layer = make_layer(3, 32, 24, 4, 2)
    with metal_moe.LayerBatch() as batch:
        x = layer.hidden_states.clone()
        watched = weakref.ref(x)
        layer.hidden_states = x
        y = layer.run()
        layer.hidden_states = x = None
        gc.collect()
        assert watched() is not None
        batch.synchronize()
        assert watched() is None
    assert torch.isfinite(y).all()


@on_cpu
def test_an_exception_loses_nothing():
    first, second = model(3, 2)
    expected = first.run()
    with pytest.raises(KeyError, match="of the caller's"), metal_moe.LayerBatch() as batch:
        y = first.run()
        raise KeyError("of the caller's")
    assert torch.equal(y, expected)
    assert batch.stats()["commits"] == 1
    with metal_moe.LayerBatch():  # and the thread is in no batch any more
        z = second.run()
    assert torch.equal(z, second.run())


@on_cpu
def test_a_refused_call_leaves_the_others():
    first, second = model(3, 2)
    expected = first.run(), second.run()
    with metal_moe.LayerBatch() as batch:
        y = first.run()
        with pytest.raises(ValueError, match="topk_ids"):
            metal_moe.fused_experts(
                second.hidden_states, second.w1, second.w2, second.topk_weights, second.topk_ids[:2]
            )
        z = second.run()
    assert torch.equal(y, expected[0]) and torch.equal(z, expected[1])
    assert batch.stats()["layers"] == 2


@on_cpu
def test_cancel_drops_what_is_not_committed():
    first, second = model(3, 2)
    expected = second.run()
    with metal_moe.LayerBatch() as batch:
        first.run()
        batch.cancel()
        y = second.run()
    assert torch.equal(y, expected)
    assert batch.stats()["commits"] == 1


@on_cpu
def test_nested(engine):
    stack = model(3, 6)
    expected = []
    x = stack[0].hidden_states
    for layer in stack:
        layer.hidden_states = x
        x = layer.run()
        expected.append(x)
    with metal_moe.LayerBatch(8) as outer:
        y = forward(stack[:2], stack[0].hidden_states)
        with metal_moe.LayerBatch(8) as inner:
            z = forward(stack[2:4], y)
        assert torch.equal(y, expected[1]) and torch.equal(z, expected[3]), "the inner block's end waits for both"
        last = forward(stack[4:], z)
    assert torch.equal(last, expected[5])
    assert outer.stats()["layers"] == 4 and inner.stats()["layers"] == 2


@on_cpu
def test_without_waiting():
    stack = model(3, 4)
    expected = forward(stack, torch.ones(3, 32))
    with pytest.raises(RuntimeError, match="needs a stream or a batch around it"), metal_moe.LayerBatch(wait=False):
        pass
    stream = metal_moe.CommandStream()
    with stream, metal_moe.LayerBatch(2, wait=False) as batch:
        y = forward(stack, torch.ones(3, 32))
    assert batch.stats()["commits"] == 2
    stream.synchronize()
    assert torch.equal(y, expected)


@on_cpu
def test_misuse():
    batch = metal_moe.LayerBatch()
    with batch, pytest.raises(RuntimeError, match="entered already"):
        batch.__enter__()
    for call in (batch.commit, batch.synchronize, batch.cancel):
        with pytest.raises(RuntimeError, match="this thread has not entered the batch"):
            call()
    with pytest.raises(RuntimeError, match="this thread has not entered the batch"):
        batch.__exit__(None, None, None)


@on_cpu
def test_blocks_of_generators_end_in_any_order():
    stack = model(3, 3)
    expected = [layer.run() for layer in stack]

    def block(layer):
        with metal_moe.LayerBatch():
            yield layer.run()

    first, second = block(stack[0]), block(stack[1])
    results = [next(first), next(second)]
    assert next(first, None) is None
    assert torch.equal(results[0], expected[0])
    assert next(second, None) is None
    assert torch.equal(results[1], expected[1])
    assert torch.equal(stack[2].run(), expected[2]), "outside of any block"


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"layers": 0}, ValueError, "layers is 0; it must be from 1"),
        ({"layers": 4097}, ValueError, "layers is 4097"),
        ({"layers": 8.0}, TypeError, "layers is 8.0 of type float"),
        ({"layers": True}, TypeError, "layers is True"),
        ({"wait": 1}, TypeError, "wait is 1"),
    ],
)
def test_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        metal_moe.LayerBatch(**arguments)


@on_cpu
def test_threads(engine):
    """Each thread has its own batch and stream; none sees another's."""
    stacks = [model(3, 12, seed=100 * t) for t in range(4)]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    expected = [forward(stack, x) for stack in stacks]
    found: list = [None] * 4
    counts: list = [None] * 4
    start = threading.Barrier(4)

    def work(t: int) -> None:
        start.wait()
        for _ in range(5):
            with metal_moe.LayerBatch(t + 1) as batch:
                found[t] = forward(stacks[t], x)
            counts[t] = batch.stats()

    with metal_moe.LayerBatch() as here:
        threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert here.stats()["operations"] == 0
    for t in range(4):
        assert torch.equal(found[t], expected[t])
        assert counts[t] == {"layers": 12, "operations": 12, "commits": 12 // (t + 1) if t else 12, "passed": 0}


@on_cpu
def test_calls_of_other_threads_are_not_batched():
    layer = make_layer(3, 32, 24, 4, 2)
    expected = layer.run()
    found = []
    with metal_moe.LayerBatch() as batch:
        thread = threading.Thread(target=lambda: found.append(layer.run()))
        thread.start()
        thread.join()
        assert torch.equal(found[0], expected)
    assert batch.stats()["operations"] == 0


@on_cpu
def test_memory_is_bounded():
    """Layers without end need the scratch of those in flight."""
    layer = make_layer(40, 64, 48, 8, 2)
    with metal_moe.LayerBatch(4):
        for _ in range(40):
            layer.run()
        high = metal_moe.pool_stats()["high_water"]
        for _ in range(400):
            layer.run()
    assert metal_moe.pool_stats()["high_water"] == high
    assert metal_moe.pool_stats()["buffers_in_use"] == 0


@pytest.mark.skipif(cases.DEVICE.type == "cpu", reason="CPU tensors have no stream of PyTorch's")
def test_on_pytorchs_stream_it_does_nothing_and_says_so(capfd):
    stack = model(3, 4)
    expected = forward(stack, torch.ones(3, 32, device=cases.DEVICE))
    metal_moe.reset_counters()
    metal_moe._core.start_log()
    with metal_moe.LayerBatch(2) as batch:
        y = forward(stack, torch.ones(3, 32, device=cases.DEVICE))
        metal_moe._core.stop_log_and_trace()
        said = f"LayerBatch does nothing for fused_experts on {metal_moe.last_dispatch()['engine']}, which runs on"
        assert capfd.readouterr().err.count(said) == 1
        assert metal_moe.counters()["fallbacks"]["passed_batch"] == 4
        assert torch.equal(y, expected), "readable at once, as ever"
        assert metal_moe.last_dispatch()["layer_batch"] == "passed"
    assert batch.stats() == {"layers": 0, "operations": 0, "commits": 0, "passed": 4}
