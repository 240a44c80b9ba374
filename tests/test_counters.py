"""What is counted, exactly: dispatches, commits, waits, scratch, copies and fallbacks, by reason."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import cases
import metal_moe
import pytest
import torch
from cases import COMMITS, ENGINES, dispatches, make_layer
from metal_moe import QuantizedExperts

# Waits for a command buffer, by an operation: CPU tensors are ready when a call returns, PyTorch's streams go on.
WAITS = {"cuda": 0, "mps": 0}
# Where the pool serves scratch; PyTorch or its stream keeps it elsewhere.
POOLED = ("native", "exact")

Counted = Callable[[], dict]


def difference(after: dict, before: dict) -> dict:
    return {
        name: difference(value, before[name]) if isinstance(value, dict) else value - before[name]
        for name, value in after.items()
    }


def nonzero(counts: dict) -> dict:
    found = {name: nonzero(value) if isinstance(value, dict) else value for name, value in counts.items()}
    return {name: value for name, value in found.items() if value}


@pytest.fixture
def counted() -> Iterator[Counted]:
    """Gives what was counted since the test began, or since the last look."""
    before = metal_moe.counters()

    def look() -> dict:
        nonlocal before
        now = metal_moe.counters()
        counts, before = difference(now, before), now
        return counts

    yield look


def expected(engine: str, dispatches: int, scratch: int, operations: int = 1) -> dict:
    """Of operations whose scratch is in the pool already."""
    return nonzero(
        {
            "operations": operations,
            "dispatches": dispatches,
            "commits": COMMITS.get(engine, 1) * operations,
            "synchronizations": WAITS.get(engine, 1) * operations,
            "pool_hits": scratch if engine in POOLED else 0,
        }
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_is_two_dispatches_one_commit_no_copy(use_engine, counted, engine, dtype):
    """The one wait is that of CPU tensors: none on a stream of PyTorch's."""
    use_engine(engine)
    layer = make_layer(1, 64, 48, 8, 2, dtype)
    layer.run()
    counted()
    layer.run()
    assert nonzero(counted()) == expected(engine, dispatches=2, scratch=1)  # h


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tokens", [9, 20])
def test_grouped_layer(use_engine, counted, engine, tokens):
    use_engine(engine)
    layer = make_layer(tokens, 64, 48, 8, 2, torch.bfloat16)
    layer.run()
    counted()
    for _ in range(3):
        layer.run()
    each = dispatches(engine, "moe_prefill4", 2 * tokens, row_tile=4)
    scratch = 6 if each == 4 else 2  # h and y; where `group` runs offsets, sorted rows, inverse and tiles too
    assert nonzero(counted()) == expected(engine, dispatches=3 * each, scratch=3 * scratch, operations=3)


@pytest.mark.parametrize("engine", ENGINES)
def test_fused_moe_is_one_operation(use_engine, counted, engine):
    use_engine(engine)
    layer = make_layer(1, 64, 48, 8, 2, torch.bfloat16)
    logits = torch.randn(1, 8)
    for _ in range(2):
        counted()
        metal_moe.fused_moe(layer.hidden_states, layer.w1, layer.w2, logits, 2)
    assert nonzero(counted()) == expected(engine, dispatches=3, scratch=3)  # ids, weights, h


def test_zero_tokens_do_nothing(counted):
    make_layer(0, 64, 48, 8, 2).run()
    counts = counted()
    assert counts["operations"] == 1
    assert counts["dispatches"] == counts["copies"] == 0 and not any(counts["fallbacks"].values())


@pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="scratch of other devices is not the pool's")
def test_pool_misses_are_allocations(counted):
    layer = make_layer(5, 64, 48, 8, 2)
    metal_moe.pool_trim()
    before = metal_moe.pool_stats()
    counted()
    layer.run()
    counts, after = counted(), metal_moe.pool_stats()
    assert counts["pool_misses"] == after["misses"] - before["misses"] > 0
    assert counts["pool_hits"] == after["hits"] - before["hits"]


def test_reset(counted):
    make_layer(1, 64, 48, 8, 2).run()
    metal_moe.reset_counters()
    assert nonzero(metal_moe.counters()) == {}
    make_layer(1, 64, 48, 8, 2).run()
    assert metal_moe.counters()["dispatches"] == 2


def test_threads_are_added_up(counted):
    """Also those that have ended."""
    layer = make_layer(1, 64, 48, 8, 2)

    def calls() -> None:
        for _ in range(50):
            layer.run()

    for _ in range(2):
        threads = [threading.Thread(target=calls) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = counted()
    assert (counts["operations"], counts["dispatches"]) == (400, 800)
    assert counts["pool_hits"] + counts["pool_misses"] == (400 if metal_moe.last_dispatch()["engine"] in POOLED else 0)


def quantized(experts: int, rows: int, columns: int) -> QuantizedExperts:
    weight = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(rows))
    return QuantizedExperts.quantize(weight, format="affine", bits=4, group_size=32)


def test_fallbacks_have_reasons(counted):
    """Each cause counts its own reason and no other."""

    def reasons() -> dict:
        counts = counted()
        assert counts["operations"] == 1
        return {**nonzero(counts["fallbacks"]), **({"copies": counts["copies"]} if counts["copies"] else {})}

    make_layer(5, 64, 48, 8, 2).run()
    assert reasons() == {}
    make_layer(5, 63, 48, 8, 2).run()
    assert reasons() == {"unaligned_rows": 1}
    make_layer(5, 64, 48, 8, 2, torch.float16, use_fp32_acc=False).run()
    assert reasons() == {}
    make_layer(5, 64, 48, 8, 2, torch.bfloat16, use_fp32_acc=False).run()
    assert reasons() == {"no_fp16_sums": 1}

    layer = make_layer(5, 64, 32, 4, 2, torch.bfloat16)
    layer.w1, layer.w2 = quantized(4, 64, 64), quantized(4, 64, 32)
    layer.run()
    assert reasons() == {}
    layer.run(kernel="moe_simd")
    assert reasons() == {"no_quantized_simd": 1}
    aligned = layer.hidden_states
    layer.hidden_states = torch.empty(5, 65, dtype=torch.bfloat16)[:, 1:].copy_(aligned)
    out = layer.run()
    assert reasons() == {"copied_input": 1, "copies": 1}
    layer.hidden_states = aligned
    assert torch.equal(layer.run(), out)
    assert reasons() == {}
    layer.w1.bias = torch.zeros(4, 64, dtype=torch.float32)
    layer.run()
    assert reasons() == {"converted_bias": 1, "copies": 1}


def test_products_by_torch_are_counted(counted):
    """Here because no kernel takes a vector."""
    metal_moe.matmul(torch.randn(64), torch.randn(64, 32))
    counts = counted()
    assert nonzero(counts) == {"operations": 1, "fallbacks": {"torch_matmul": 1}}
    assert metal_moe.last_dispatch()["family"] == "torch"


def test_a_reason_must_exist():
    with pytest.raises(ValueError, match="no fallback has that name"):
        metal_moe._core.count_fallback("bad luck")
