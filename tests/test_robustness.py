"""What must not go wrong in long use: strange ids and values, many calls, many threads."""

from __future__ import annotations

import os
import sys
import threading

import cases
import metal_moe
import numpy as np
import pytest
import torch
from cases import DTYPES, ENGINES, FAMILIES, TOLERANCE, Layer, dispatches, make_layer
from metal_moe import QuantizedExperts

STRAY_IDS = [-1, -(2**31), 2**31 - 1, 8, 9, 1 << 20]


def assert_same_where_finite(out: torch.Tensor, layer: Layer, about: object = "") -> np.ndarray:
    """NaN and infinities where the reference has them and nowhere else; the rest within rounding. The reference."""
    with np.errstate(all="ignore"):
        expected = layer.reference()
    got = out.double().numpy()
    most = torch.finfo(out.dtype).max
    assert np.array_equal(np.isnan(got), np.isnan(expected)), f"NaN in other places: {about}"
    beyond = np.abs(expected) > most
    assert np.array_equal(np.isinf(got) & ~np.isnan(expected), beyond), f"infinities in other places: {about}"
    assert np.array_equal(np.sign(got[beyond]), np.sign(expected[beyond])), about
    finite = np.isfinite(expected) & ~beyond
    for row in range(len(got)):
        if finite[row].any():
            wanted = expected[row][finite[row]]
            error = np.linalg.norm(got[row][finite[row]] - wanted)
            assert error <= TOLERANCE[out.dtype] * np.linalg.norm(wanted), (row, about)
    return expected


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("int64", [False, True])
def test_ids_out_of_range_contribute_nothing(use_engine, engine, family, int64):
    """Whatever they are: the slot counts as if its weight were 0, and no memory beyond the weights is read."""
    use_engine(engine)
    layer = make_layer(6, 32, 16, 8, 3, torch.float32)
    for row, stray in enumerate(STRAY_IDS):
        layer.topk_ids[row, row % 3] = stray
    layer.topk_ids[5] = torch.tensor([-1, 8, 2**31 - 1])  # nothing at all
    if int64:
        layer.topk_ids = layer.topk_ids.long()
        layer.topk_ids[0, 0] = 1 << 32  # 0 in its lower half
        layer.topk_ids[1, 1] = -(1 << 40)
    kept = (layer.topk_ids >= 0) & (layer.topk_ids < 8)
    out = layer.run(kernel=family)
    cases.assert_close(out, layer.reference(), f"{layer} {family}")
    assert not out[5].any()
    zeroed = Layer(*vars(layer).values())
    zeroed.topk_weights = layer.topk_weights * kept
    zeroed.topk_ids = layer.topk_ids.where(kept, torch.zeros_like(layer.topk_ids))
    cases.assert_close(out, zeroed.reference())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_stay_in_their_row(use_engine, engine, family, dtype, value):
    use_engine(engine)
    layer = make_layer(5, 32, 16, 4, 2, DTYPES[dtype])
    clean = layer.run(kernel=family)
    layer.hidden_states[2, 7] = value
    out = layer.run(kernel=family)
    expected = assert_same_where_finite(out, layer, f"{value} {family} {dtype}")
    assert not np.isfinite(expected[2]).any()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["w1", "w2"])
def test_weights_that_are_not_finite_reach_their_tokens_alone(use_engine, engine, family, value, which):
    """Those of one expert: in w1 every column of the tokens that chose it, in w2 the one column."""
    use_engine(engine)
    layer = make_layer(7, 32, 16, 4, 2, torch.bfloat16)
    clean = layer.run(kernel=family)
    expert = int(layer.topk_ids[0, 0])
    getattr(layer, which)[expert, 3, 5] = value
    out = layer.run(kernel=family)
    expected = assert_same_where_finite(out, layer, f"{value} in {which}, {family}")
    users = (layer.topk_ids == expert).any(dim=1)
    assert users.any() and not users.all()
    assert torch.equal(out[~users], clean[~users])
    touched = ~np.isfinite(expected[users.numpy()])
    assert touched.any(axis=1).all() if which == "w2" or value != value else touched.any()
    if which == "w2":
        assert not np.delete(touched, 3, axis=1).any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_quantised_layers_pass_nan_on(use_engine, engine, tokens):
    """From activations and from scales, to the tokens concerned alone."""
    use_engine(engine)
    layer = make_layer(tokens, 64, 32, 4, 2, torch.float32, activation="silu")
    layer.w1, layer.w2 = (QuantizedExperts.quantize(w, bits=4, group_size=32) for w in (layer.w1, layer.w2))
    clean = layer.run()
    assert torch.isfinite(clean).all()
    row = tokens // 2
    layer.hidden_states[row, 3] = float("nan")
    out = layer.run()
    others = [each for each in range(tokens) if each != row]
    assert torch.isnan(out[row]).all()
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_weight_of_nan_is_its_token_s_alone(use_engine, engine):
    use_engine(engine)
    for family in FAMILIES:
        layer = make_layer(5, 32, 16, 4, 2, torch.float16)
        clean = layer.run(kernel=family)
        layer.topk_weights[3, 1] = float("nan")
        out = layer.run(kernel=family)
        assert torch.isnan(out[3]).all()
        assert torch.equal(out[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform == "darwin", reason="reads /proc/self/statm, which Linux has")
@pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="memory of the process, not of a GPU")
def test_many_calls_do_not_grow_memory():
    """10^5 calls of a small layer, with and without grouping: neither the process nor the pool grows."""
    layers = [make_layer(tokens, 16, 8, 4, 2) for tokens in (1, 3)]
    results = [layer.run() for layer in layers]

    def calls(count: int) -> None:
        for _ in range(count // 2):
            for layer in layers:
                layer.run()

    calls(5_000)  # allocators settle
    memory, pool, counted = resident_bytes(), metal_moe.pool_stats(), metal_moe.counters()
    calls(100_000)
    after, now = metal_moe.pool_stats(), metal_moe.counters()
    assert now["operations"] - counted["operations"] == 100_000
    assert after["misses"] == pool["misses"]
    assert after["bytes_idle"] + after["bytes_in_use"] == pool["bytes_idle"] + pool["bytes_in_use"]
    # 10 bytes kept by each call would show.
    assert resident_bytes() - memory < 1_000_000
    assert all(torch.equal(layer.run(), result) for layer, result in zip(layers, results, strict=True))


def test_four_threads_at_once_agree_bitwise():
    """Different layers at the same time in each thread, the same ones in all."""
    layers = [make_layer(tokens, 64, 48, 8, 2, dtype) for tokens in (1, 4, 33) for dtype in DTYPES.values()]
    expected = [layer.run() for layer in layers]
    meeting = threading.Barrier(4)
    failures: list[str] = []

    def work(thread: int) -> None:
        meeting.wait()
        for turn in range(30):
            index = (turn * 5 + thread) % len(layers)
            try:
                if not torch.equal(layers[index].run(), expected[index]):
                    failures.append(f"thread {thread}: {layers[index]}")
                ran, ids = metal_moe.last_dispatch(), layers[index].topk_ids
                if ran["dispatches"] != dispatches(ENGINES[0], ran["family"], ids.numel(), ran["row_tile"]):
                    failures.append(f"thread {thread}: last_dispatch is another thread's")
            except Exception as error:  # a thread's exception fails no test by itself
                failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:5]
