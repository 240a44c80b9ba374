"""Scratch memory: reused, bounded, given back; and a process that forks."""

import multiprocessing

import cases
import metal_moe
import pytest
import torch
from cases import make_layer

of_the_pool = pytest.mark.skipif(
    cases.DEVICE.type != "cpu", reason="scratch stays with PyTorch (CUDA) or its stream (MPS: test_mps.py)"
)
returns_at_once = pytest.mark.skipif(
    cases.DEVICE.type == "mps", reason="scratch stays with PyTorch's stream until it is trimmed: test_mps.py"
)


@pytest.fixture
def trimmed():
    metal_moe.pool_trim()
    return metal_moe.pool_stats()


@of_the_pool
def test_scratch_is_reused(trimmed):
    layers = [make_layer(tokens, 64, 48, 8, 2, torch.bfloat16) for tokens in (1, 5, 20, 70)]
    for layer in layers:
        layer.run()
    warm = metal_moe.pool_stats()
    for layer in layers * 50:
        layer.run()
    after = metal_moe.pool_stats()
    assert after["misses"] == warm["misses"], "a buffer was allocated although all had been there before"
    assert after["hits"] > warm["hits"]
    assert after["bytes_idle"] == warm["bytes_idle"]


@returns_at_once
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_nothing_stays_in_use(tokens):
    layer = make_layer(tokens, 64, 48, 8, 2)
    layer.run()
    metal_moe.fused_topk(torch.randn(tokens, 8), 2)
    metal_moe.group_tokens(layer.topk_ids, 8)
    stats = metal_moe.pool_stats()
    assert stats["bytes_in_use"] == 0 and stats["buffers_in_use"] == 0


@of_the_pool
def test_trim_gives_memory_back():
    layer = make_layer(40, 64, 48, 8, 2)
    expected = layer.run()
    assert metal_moe.pool_stats()["bytes_idle"] > 0
    metal_moe.pool_trim()
    assert metal_moe.pool_stats()["bytes_idle"] == 0
    assert torch.equal(layer.run(), expected)


@of_the_pool
def test_high_water_covers_what_a_call_needs(trimmed):
    """At least the intermediate and the sorted rows of the layer; not much more than what has been idle since."""
    layer = make_layer(64, 128, 96, 4, 2)
    layer.run(kernel="moe_base")
    stats = metal_moe.pool_stats()
    assert stats["high_water"] >= 64 * 2 * (96 + 128) * 4
    assert stats["bytes_idle"] >= 64 * 2 * (96 + 128) * 4


def test_results_outlive_scratch():
    """An output is the caller's: later calls do not write to it."""
    layer = make_layer(9, 64, 48, 8, 2)
    first = layer.run()
    kept = first.clone()
    layer.hidden_states = -layer.hidden_states
    for _ in range(5):
        layer.run()
    assert torch.equal(first, kept)


def child(layer, connection):
    connection.send(layer.run().double().sum().item())


@pytest.mark.skipif(cases.DEVICE.type == "cuda", reason="CUDA does not run in a forked process")
def test_a_forked_process_computes():
    """A data loader's worker is forked from a process whose engine threads it does not have."""
    layer = make_layer(40, 512, 384, 8, 2)
    expected = layer.run().double().sum().item()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(layer, sender))
    process.start()
    try:
        assert receiver.poll(60), "the forked process does not answer"
        assert receiver.recv() == expected
    finally:
        process.kill()
        process.join()
