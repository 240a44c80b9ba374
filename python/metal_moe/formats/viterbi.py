"""The search behind trellis codes: for 256 values the closed walk through the trellis with the nearest codebook values.

A walk is a sequence of 16-bit states, each the last one shifted left by the step's bits with new bits below; it closes
when the last state leads back to the first, for then 256 * bits bits hold it. Two states that agree in the bits that
stay lead to the same next states, so a step keeps only the best way to each *node*: 2**(16 - bits) of them.

Closing it exactly would take a search per node. Instead there are two passes: one from the middle of the ring around to
the middle, with free ends, tells which node a good walk passes between the last value and the first; the other starts
and ends in that node. (A first pass over the neighbourhood alone is faster, and its walks have 1 to 3 % more error.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .codebooks import table_on
from .trellis import STATE_BITS, WEIGHTS, step_bits

STATES = 1 << STATE_BITS

# Costs of all nodes are kept for all steps until a batch of tiles is traced back: that many bytes per thread.
HISTORY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 32}
# Tiles per step: on a CPU the working set, two times 65536 floats per tile, should stay in a core's L2 cache; on a GPU
# a step is a few launches, which 128 tiles make worth it.
TILES_PER_STEP = {"cpu": 2, "cuda": 128}

# Bits of a row in the order new, old, staying of `_forward`; where rows would be shorter the natural order is faster.
LONG_ROW_BITS = 6


def nearest_walks(values: Tensor, bits: float, codebook: str) -> Tensor:
    """States int32 [n, 256] of closed walks close to `values` [n, 256] float32, in the codebook's own scale.

    This is the part of the quantiser that takes the time: a sum and a comparison for each of 65536 states, 512 times
    per tile. On a CPU each thread works on tiles of its own.
    """
    steps = [int(step) for step in step_bits(bits)]
    kind = "cuda" if values.is_cuda else "cpu"
    batch = max(1, HISTORY_BYTES[kind] // (4 * sum(STATES >> step for step in steps)))
    tiles = TILES_PER_STEP[kind]
    values = values.float()
    if kind == "cuda":
        found = [_closed(some, steps, codebook, tiles) for some in values.split(batch)]
    else:
        threads = torch.get_num_threads()
        batch = min(batch, max(1, math.ceil(values.shape[0] / threads)))
        torch.set_num_threads(1)  # of PyTorch's own, within an operation: they would wait for one another at each
        try:
            with ThreadPoolExecutor(threads) as pool:
                work = [pool.submit(_closed, some, steps, codebook, tiles) for some in values.split(batch)]
                found = [each.result() for each in work]
        finally:
            torch.set_num_threads(threads)
    return torch.cat(found) if found else values.new_empty(0, WEIGHTS, dtype=torch.int32)


@torch.no_grad()
def _closed(values: Tensor, steps: list[int], codebook: str, tiles: int) -> Tensor:
    n = values.shape[0]
    book = table_on(codebook, values.device, torch.float32)
    middle = WEIGHTS // 2
    free = values.new_zeros(n, STATES >> steps[middle])
    around = _forward(values, [*range(middle, WEIGHTS), *range(middle)], steps, book, free, tiles)
    _, seam = _trace(values, range(middle), steps, book, around[middle:], around[-1].argmin(1))
    del around
    fixed = values.new_full((n, STATES >> steps[0]), torch.inf).scatter_(1, seam[:, None], 0.0)
    history = _forward(values, range(WEIGHTS), steps, book, fixed, tiles)
    states, _ = _trace(values, range(WEIGHTS), steps, book, history, seam)
    return states


def _forward(
    values: Tensor, order: Sequence[int], steps: list[int], book: Tensor, start: Tensor, tiles: int
) -> list[Tensor]:
    """Costs [n, nodes] of the best way to each node, before each step and after the last."""
    n = values.shape[0]
    following = [steps[(t + 1) % WEIGHTS] for t in order]
    history = [start, *(values.new_empty(n, STATES >> bits) for bits in following)]
    by_new_bits = {bits: book.view(-1, 1 << bits).T.contiguous() for bits in set(steps)}
    for first in range(0, n, tiles):
        some = values[first : first + tiles]
        m = some.shape[0]
        difference, total = values.new_empty(m, STATES), values.new_empty(m, STATES)
        for place, t in enumerate(order):
            costs, result = (history[place + i][first : first + m] for i in (0, 1))
            old, new = 1 << following[place], 1 << steps[t]
            if STATE_BITS - steps[t] - following[place] >= LONG_ROW_BITS:
                # A state is old bits that drop out next, bits that stay, new bits: here in the order new, old, staying.
                torch.sub(by_new_bits[steps[t]].view(-1), some[:, t, None], out=difference)
                rows = (m, new, STATES // new)
                torch.addcmul(costs[:, None], difference.view(rows), difference.view(rows), out=total.view(rows))
                best = total.view(m, new, old, -1).amin(2)
                result.view(m, -1, new).copy_(best.transpose(1, 2))
            else:
                torch.sub(book, some[:, t, None], out=difference)
                rows = (m, STATES // new, new)
                torch.addcmul(costs[:, :, None], difference.view(rows), difference.view(rows), out=total.view(rows))
                torch.amin(total.view(m, old, -1), 1, out=result)
    return history


def _trace(
    values: Tensor, order: Sequence[int], steps: list[int], book: Tensor, history: list[Tensor], node: Tensor
) -> tuple[Tensor, Tensor]:
    """States of the best walks that end in `node` after the steps of `order`, and the nodes in which they began."""
    states = torch.empty(values.shape[0], len(order), dtype=torch.int32, device=values.device)
    for place in reversed(range(len(order))):
        t = order[place]
        old = steps[(t + 1) % WEIGHTS]
        candidates = (torch.arange(1 << old, device=values.device) << STATE_BITS - old) + node[:, None]
        difference = book[candidates] - values[:, t, None]
        # The same products and sums as in `_forward`, so that the least of them is the one that was kept there.
        costs = torch.addcmul(history[place].gather(1, candidates >> steps[t]), difference, difference)
        state = candidates.gather(1, costs.argmin(1, keepdim=True))[:, 0]
        states[:, place] = state
        node = state >> steps[t]
    return states, node
