"""Timing of a function on a device: warmed up, synchronised, the median of enough repetitions."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it. CPU operations are done when they return."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def median_seconds(
    function: Callable[[], object],
    device: torch.device | str = "cpu",
    *,
    budget: float = 1.0,
    warm_up: int = 2,
    at_least: int = 3,
    at_most: int = 100,
) -> float:
    """Median time of a call, in seconds.

    Args:
        function: called without arguments.
        device: synchronised after every call.
        budget: stop repeating after this many seconds, warm-up not counted.
        warm_up: calls before the first that counts: they compile, allocate and page in.
        at_least, at_most: repetitions, whatever the budget.
    """
    device = torch.device(device)
    for _ in range(warm_up):
        function()
    synchronize(device)
    times: list[float] = []
    while len(times) < at_least or (sum(times) < budget and len(times) < at_most):
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
