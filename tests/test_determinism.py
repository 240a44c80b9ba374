"""The same bits on every run, on any number of threads, from several threads at once, and whatever ran before."""

import threading

import metal_moe
import pytest
import torch
from cases import DTYPES, FAMILIES, make_layer

TOKENS = [1, 9, 24, 70]


def layer_of(tokens, dtype, **options):
    return make_layer(tokens, 136, 120, 12, 3, DTYPES[dtype], shared=1, routing="dropped", **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_run_to_run(tokens, dtype, family):
    layer = layer_of(tokens, dtype)
    first = layer.run(kernel=family)
    for _ in range(10):
        assert torch.equal(layer.run(kernel=family), first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_across_thread_counts(num_threads, family, dtype):
    layer = layer_of(33, dtype)
    results = []
    for threads in (1, 2, 3, 8):
        num_threads(threads)
        results += [layer.run(kernel=family) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_thread_count_can_be_read_back(num_threads):
    for threads in (1, 4, 2):
        num_threads(threads)
        assert metal_moe.get_num_threads() == threads


def test_whatever_ran_before():
    """Scratch memory of other shapes and families leaves no trace."""
    cases = [(layer_of(t, dtype, seed=t), family) for t in TOKENS for dtype in DTYPES for family in FAMILIES]
    first = [layer.run(kernel=family) for layer, family in cases]
    for order in (reversed(range(len(cases))), range(0, len(cases), 2), range(len(cases))):
        for i in order:
            layer, family = cases[i]
            assert torch.equal(layer.run(kernel=family), first[i])


@pytest.mark.parametrize("tokens", TOKENS)
def test_from_several_threads_at_once(tokens):
    layer = layer_of(tokens, "bf16")
    logits = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(1))
    layer.options.pop("shared_weights", None)

    def run():
        return layer.run(), metal_moe.fused_moe(layer.hidden_states, layer.w1, layer.w2, logits, 3, **layer.options)

    expected = run()
    failures = []

    def worker():
        try:
            for _ in range(15):
                if not all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True)):
                    failures.append("other bits")
        except Exception as error:  # noqa: BLE001  a thread's exception would be lost
            failures.append(repr(error))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_token_does_not_depend_on_the_order_of_the_others(tokens, family):
    """Permuting the tokens permutes the rows of the output, bit for bit."""
    layer = layer_of(tokens, "fp32")
    expected = layer.run(kernel=family)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))
    layer.hidden_states = layer.hidden_states[order].contiguous()
    layer.topk_weights, layer.topk_ids = layer.topk_weights[order], layer.topk_ids[order]
    assert torch.equal(layer.run(kernel=family), expected[order])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_batch(family, dtype):
    """Within a family a token alone has the bits that it has among others."""
    layer = layer_of(33, dtype)
    expected = layer.run(kernel=family)
    for token in (0, 7, 32):
        rows = slice(token, token + 1)
        alone = metal_moe.fused_experts(
            layer.hidden_states[rows],
            layer.w1,
            layer.w2,
            layer.topk_weights[rows],
            layer.topk_ids[rows],
            kernel=family,
            **layer.options,
        )
        assert torch.equal(alone, expected[rows])
