"""Timing of several implementations in turn, and of CUDA graphs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from metal_moe.timing import synchronize
from torch import Tensor

from .cases import Call

# Fewer samples have no median to speak of, whatever they cost.
AT_LEAST = 3
# Replays of a graph: the median moves little beyond.
GRAPH_REPLAYS = 40
# A GPU that has waited for the host takes a while to run at full clock again.
GRAPH_WARM_UP_SECONDS = 0.02

Run = Callable[[Call], Tensor]


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    samples: int


def timing(samples: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def time_in_turn(
    implementations: dict[str, Run], calls: list[Call], device: torch.device, rounds: int, budget: float
) -> dict[str, Timing]:
    """Time of a call as its caller has it: from the call until the device has finished.

    In every round each implementation runs once, each on another input than the one before it. An implementation that
    has used `budget` seconds sits out the rounds that are left.
    """
    samples: dict[str, list[float]] = {name: [] for name in implementations}
    for round_number in range(-1, rounds):  # the first one warms up
        for place, (name, run) in enumerate(implementations.items()):
            if len(samples[name]) >= AT_LEAST and sum(samples[name]) > budget:
                continue
            call = calls[(round_number + 3 * place) % len(calls)]
            synchronize(device)
            start = time.perf_counter()
            run(call)
            synchronize(device)
            if round_number >= 0:
                samples[name].append(time.perf_counter() - start)
    return {name: timing(values) for name, values in samples.items()}


def time_graph(run: Run, calls: list[Call], budget: float) -> tuple[Timing, Tensor]:
    """Time of a call in a CUDA graph of all `calls`, one after the other, and what the first one of them computed.

    A sample is a replay's time by CUDA's events over the number of calls.
    """
    for call in calls:  # compiles, and fills caches of libraries
        run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = run(calls[0])
        for call in calls[1:]:
            run(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    warm = 0.0
    while warm < GRAPH_WARM_UP_SECONDS:
        warm += replay()
    samples: list[float] = []
    while len(samples) < AT_LEAST or (len(samples) < GRAPH_REPLAYS and sum(samples) < budget):
        samples.append(replay())
    return timing([sample / len(calls) for sample in samples]), first.clone()
