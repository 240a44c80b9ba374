"""CUDA tensors: PyTorch's streams, graphs, allocator and devices."""

import threading

import metal_moe
import pytest
import torch
from cases import FAMILIES, assert_close, make_layer
from metal_moe import QuantizedExperts

OWN_DEVICE = True


def cuda_layer(tokens, dtype=torch.bfloat16, hidden=128, intermediate=96, experts=8, top_k=2, **options):
    layer = make_layer(tokens, hidden, intermediate, experts, top_k, dtype, **options)
    return layer.to(torch.device("cuda")), layer.reference()


def spin(milliseconds: int) -> None:
    torch.cuda._sleep(milliseconds * 1_500_000)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_results_stay_on_the_device(family, dtype, tokens):
    layer, expected = cuda_layer(tokens, dtype, shared=1)
    out = layer.run(kernel=family)
    assert out.is_cuda and out.dtype == dtype
    ran = metal_moe.last_dispatch()
    assert (ran["engine"], ran["commits"]) == ("cuda", 1)
    assert_close(out, expected, f"{layer} {family}")


def test_nothing_waits():
    """A call returns while the stream is still busy with what came before it."""
    layer, expected = cuda_layer(20)
    layer.run()
    torch.cuda.synchronize()
    spin(200)
    out = layer.run()
    assert not torch.cuda.current_stream().query(), "the call waited for the stream"
    assert_close(out, expected, layer)


@pytest.mark.parametrize("tokens", [1, 20])
def test_current_stream(tokens):
    """The call is ordered behind what its stream holds, on any stream."""
    layer, expected = cuda_layer(tokens)
    right = layer.hidden_states
    layer.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.full_like(right, torch.nan)
        spin(50)
        late.copy_(right)
        layer.hidden_states = late
        out = layer.run()
    stream.synchronize()
    assert_close(out, expected, layer)


@pytest.mark.parametrize("tokens", [1, 5, 20, 70])
@pytest.mark.parametrize("whole", [False, True])
def test_graph(tokens, whole):
    """Captured once, replayed on new inputs; calls between replays do not disturb the graph's scratch."""
    layer, _ = cuda_layer(tokens)
    logits = torch.randn(tokens, 8, device="cuda")

    def step():
        if whole:
            return metal_moe.fused_moe(layer.hidden_states, layer.w1, layer.w2, logits, 2)
        return layer.run()

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    others = [cuda_layer(t, seed=t)[0] for t in (3, 33)]
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        layer.hidden_states.normal_(generator=generator)
        logits.normal_(generator=generator)
        expected = step()
        graph.replay()
        assert torch.equal(out, expected)
        for other in others:
            other.run()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("bits", [None, 4, 6])
@pytest.mark.parametrize("captured", [False, True])
def test_what_is_written_right_before_a_call(bits, captured):
    """Kernels that begin early read nothing too early: x, ids, routing weights and weights, all new for every call."""

    def new_layer(seed):
        layer, _ = cuda_layer(1, hidden=1024, intermediate=512, experts=16, top_k=4, seed=seed)
        if bits:
            layer.w1 = QuantizedExperts.quantize(layer.w1, bits=bits)
            layer.w2 = QuantizedExperts.quantize(layer.w2, bits=bits)
        return layer

    def buffers(weights):
        return [buffer for part in weights.parts.values() for buffer in part.buffers().values()] if bits else [weights]

    def tensors(layer):
        return [layer.hidden_states, layer.topk_ids, layer.topk_weights, *buffers(layer.w1), *buffers(layer.w2)]

    layers, used = [new_layer(seed) for seed in range(4)], new_layer(4)
    expected = [layer.run() for layer in layers]
    torch.cuda.synchronize()

    def step(layer):
        for to, new in zip(tensors(used), tensors(layer), strict=True):
            to.copy_(new)
        return used.run()

    results = [step(layer) for layer in 5 * layers]
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [step(layer) for layer in 5 * layers]
        graph.replay()
        graph.replay()
    for number, out in enumerate(results):
        assert torch.equal(out, expected[number % len(layers)]), number


def test_first_use_in_a_graph():
    """Kernels are compiled and loaded while a stream is captured."""
    layer, expected = cuda_layer(5, torch.float16, activation="relu2", hidden=72)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.run(kernel="moe_prefill4", use_fp32_acc=False)
    graph.replay()
    assert_close(out, expected, layer)


def test_from_a_thread_that_has_not_used_cuda():
    layer, expected = cuda_layer(9)
    results = []

    def work():
        results.append(layer.run())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert_close(results[0], expected, layer)


def test_several_streams_at_once():
    layers = [cuda_layer(t, seed=t) for t in (1, 6, 19, 50)]
    for layer, _ in layers:
        layer.run()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    results = []
    for _ in range(20):
        for stream, (layer, expected) in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                results.append((layer.run(), expected))
    torch.cuda.synchronize()
    for out, expected in results:
        assert_close(out, expected)


def test_more_threadgroups_than_a_launch_takes():
    """65535 threadgroups in y are CUDA's limit; `combine` has one per token, `gather_experts` one per id."""
    layer, expected = cuda_layer(70_000, hidden=8, intermediate=8, experts=4, top_k=1)
    assert_close(layer.run(), expected, layer)
    weights = torch.randn(5, 3, device="cuda")
    ids = torch.randint(0, 5, (70_000,), device="cuda")
    assert torch.equal(metal_moe.gather_experts(weights, ids), weights[ids])


def test_tensors_on_two_devices_are_refused():
    layer, _ = cuda_layer(3)
    layer.w1 = layer.w1.cpu()
    with pytest.raises(ValueError, match="w1 is on device cpu; it must be on cuda:0"):
        layer.run()


def test_compiled():
    layer, expected = cuda_layer(6)
    compiled = torch.compile(
        lambda x: metal_moe.fused_experts(x * 2, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids)
    )
    out = compiled(layer.hidden_states / 2)
    assert_close(out, expected, layer)


def test_operator_check():
    layer, _ = cuda_layer(4)
    arguments = (layer.hidden_states, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids)
    torch.library.opcheck(torch.ops.metal_moe.fused_experts.default, arguments)


def test_device_info():
    info = metal_moe.device_info("cuda")
    assert info["engine"] == "cuda" and info["simd_width"] == 32
    assert torch.cuda.get_device_name(0) in info["name"]
    assert metal_moe.kernels("cuda") == metal_moe.kernels("cpu")
