"""MPS tensors: in place, on PyTorch's stream, without a command buffer of our own; and what only Apple's Metal has.

Collected with `--device mps`. The other tests then run on MPS tensors too, moved there and back; these are about order,
memory and errors, which that cannot show.
"""

import os
import subprocess
import sys
import threading

import metal_moe
import pytest
import torch
from cases import assert_close, dispatches, make_layer

OWN_DEVICE = True

MPS = torch.device("mps")


def mps_layer(tokens: int = 9, dtype: torch.dtype = torch.bfloat16, **options):
    """A layer on the GPU, and what float64 makes of it."""
    sizes = {"hidden": 64, "intermediate": 48, "experts": 8, "top_k": 2, **options}
    layer = make_layer(tokens, dtype=dtype, **sizes)
    return layer.to(MPS), layer.reference()


@pytest.mark.parametrize("tokens", [1, 9, 20, 70])
def test_encodes_into_pytorchs_command_buffer(tokens):
    layer, expected = mps_layer(tokens)
    out = layer.run()
    ran = metal_moe.last_dispatch()
    assert out.device.type == "mps"
    assert (ran["engine"], ran["commits"]) == ("mps", 0)
    assert ran["dispatches"] == dispatches("mps", ran["family"], 2 * tokens, ran["row_tile"])
    assert_close(out.cpu(), expected, layer)


def test_order_with_pytorchs_operations():
    """Inputs written just before, results read just after, and written over: no synchronisation anywhere."""
    layer, _ = mps_layer(20)
    x = layer.hidden_states.clone()
    expected = [layer.run()]
    results = []
    for step in range(50):
        layer.hidden_states.copy_(x * (1 if step % 2 == 0 else -1))
        out = layer.run()
        results.append(out + 0)
        out.fill_(float("nan"))
    layer.hidden_states.copy_(-x)
    expected.append(layer.run())
    for step, result in enumerate(results):
        assert torch.equal(result, expected[step % 2])


def test_storage_offset():
    layer, expected = mps_layer(5, torch.float32)
    x = layer.hidden_states
    room = torch.full((x.numel() + 3 * 64 + 7,), float("nan"), device=MPS)
    for offset in (1, 7, 64, 199):
        view = room[offset : offset + x.numel()].view(x.shape)
        view.copy_(x)
        layer.hidden_states = view
        assert_close(layer.run().cpu(), expected, f"offset {offset}")
        view.fill_(float("nan"))


def test_results_are_new_memory():
    layer, _ = mps_layer(5)
    a, b = layer.run(), layer.run()
    assert a.data_ptr() != b.data_ptr() and torch.equal(a, b)
    assert a.storage_offset() == 0


def test_several_threads():
    layers = [mps_layer(tokens, seed=tokens) for tokens in (1, 6, 19, 50)]
    results = [[] for _ in layers]

    def work(place):
        for _ in range(20):
            results[place].append(layers[place][0].run())

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, (_, expected) in zip(results, layers, strict=True):
        for out in outs:
            assert_close(out.cpu(), expected)


def test_scratch_is_kept_and_given_back():
    layer, expected = mps_layer(70)
    layer.run()
    torch.mps.synchronize()
    before = metal_moe.pool_stats()
    assert before["bytes_in_use"] > 0
    for _ in range(20):
        layer.run()
    assert metal_moe.pool_stats()["misses"] == before["misses"]
    metal_moe.pool_trim()
    torch.mps.synchronize()
    assert metal_moe.pool_stats()["bytes_in_use"] == 0
    assert_close(layer.run().cpu(), expected)


def test_errors_leave_pytorchs_stream_usable():
    layer, expected = mps_layer(9, hidden=66)
    with pytest.raises(ValueError, match="moe_simd"):
        layer.run(kernel="moe_simd")
    assert_close(layer.run().cpu(), expected)


def test_cpu_tensors_are_refused():
    layer = make_layer(3, 64, 48, 8, 2)
    with pytest.raises(ValueError, match='tensors are on device cpu; this build computes tensors on "mps"'):
        layer.run()
    moved = layer.to(MPS)
    moved.w1 = moved.w1.cpu()
    with pytest.raises(ValueError, match="w1 is on device cpu; it must be on mps:0"):
        moved.run()


def test_operator_check():
    layer, _ = mps_layer(4)
    arguments = (layer.hidden_states, layer.w1, layer.w2, layer.topk_weights, layer.topk_ids)
    torch.library.opcheck(torch.ops.metal_moe.fused_experts.default, arguments)


def test_own_queue_gives_the_same_bits():
    """METAL_MOE_MPS_QUEUE=own: a queue of its own, ordered against PyTorch's stream by a shared event."""
    script = """
import hashlib, torch, metal_moe
from cases import make_layer
layer = make_layer(20, 64, 48, 8, 2, torch.bfloat16).to(torch.device("mps"))
x, digest = layer.hidden_states.clone(), hashlib.sha256()
for step in range(30):
    layer.hidden_states.copy_(x * (step + 1))
    out = layer.run()
    digest.update((out + 0).float().cpu().numpy().tobytes() if step % 10 == 9 else b"")
print(metal_moe.last_dispatch()["commits"], digest.hexdigest())
"""
    said = {}
    for queue in ("torch", "own"):
        environment = {**os.environ, "METAL_MOE_MPS_QUEUE": queue, "PYTHONPATH": os.path.dirname(__file__)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[queue] = done.stdout.split()
    assert said["torch"][0] == "0" and said["own"][0] == "1"
    assert said["torch"][1] == said["own"][1]


def test_residency():
    layer, expected = mps_layer(9)
    with metal_moe.keep_resident(layer.w1, layer.w2) as weights:
        assert weights.bytes >= (layer.w1.nbytes + layer.w2.nbytes if weights.supported else 0)
        assert_close(layer.run().cpu(), expected)
    assert weights.bytes == 0
    weights.release()
    quantised = metal_moe.QuantizedExperts.quantize(torch.ones(2, 64, 64)).to("mps")
    with metal_moe.keep_resident(layer.w1, quantised) as weights:
        assert weights.bytes >= (layer.w1.nbytes + quantised.nbytes if weights.supported else 0)
    with pytest.raises(ValueError, match="tensors is on device cpu; it must be on device mps"):
        metal_moe.keep_resident(torch.ones(3))


def test_capture(tmp_path):
    script = f"""
import torch, metal_moe
x = torch.randn(4, 16, device="mps")
with metal_moe.capture({str(tmp_path / "layer.gputrace")!r}) as path:
    metal_moe.fused_topk(x, 2)
print(path)
"""
    environment = {**os.environ, "MTL_CAPTURE_ENABLED": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "layer.gputrace").exists()
    environment.pop("MTL_CAPTURE_ENABLED")
    done = subprocess.run(
        [sys.executable, "-c", script.replace("layer.", "again.")], env=environment, capture_output=True, text=True
    )
    assert "MTL_CAPTURE_ENABLED=1" in done.stderr


def test_device_info():
    info = metal_moe.device_info("mps")
    assert info["engine"] == "mps" and info["simd_width"] == 32
    assert info["name"].startswith("Apple")
    assert info["kernels"] == len(metal_moe.kernels("mps"))
