"""`with metal_moe.profile() as p:`"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .. import _core
from .._validate import SUPPORTED_DEVICES, wrong_type, wrong_value
from ..memory_bandwidth import memory_bandwidth


@dataclass(frozen=True)
class KernelProfile:
    """One kernel in a profile; times in seconds."""

    engine: str
    family: str
    """Of the layer that it ran for, "" where that has none."""
    kernel: str
    dispatches: int
    timed: int
    """Dispatches whose time on the device is known: the others are in `dispatches` and `encode_seconds` alone."""
    bytes: int
    """Read and written, as the dispatches declare: of weights, those of as many experts as the tokens can choose."""
    seconds: float
    fastest: float
    slowest: float
    encode_seconds: float
    """On the CPU."""

    def fraction(self, bandwidth: float) -> float | None:
        """Time that the bytes take at `bandwidth` bytes per second over the time taken; None where that is unknown."""
        return self.bytes / bandwidth / self.seconds if self.seconds else None


class Profile:
    """What ran between the beginning and the end of a `with` block; made by `profile()`."""

    def __init__(self, bandwidth: Mapping[str, float]):
        self._bandwidth = dict(bandwidth)
        self._core: _core.Profile | None = None
        self._kernels: list[KernelProfile] | None = None

    def __enter__(self) -> Profile:
        if self._core is not None:
            raise RuntimeError("profile: this one has begun already; make another with metal_moe.profile()")
        _synchronize()
        self._core = _core.Profile()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            _synchronize()
        finally:
            self._core.stop()
        _core.collect()
        self._kernels = [_kernel(values) for values in self._core.kernels()]

    @property
    def kernels(self) -> list[KernelProfile]:
        """By kernel, in the order in which they first ran. RuntimeError before the block has ended."""
        if self._kernels is None:
            raise RuntimeError("profile: the with block has not ended")
        return self._kernels

    @property
    def seconds(self) -> float:
        """On the device, of all dispatches whose time is known."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Of the same."""
        return sum(kernel.bytes for kernel in self.kernels)

    def bandwidth(self, engine: str) -> float:
        """Bytes per second of the engine's device: given to `profile()`, or measured, once per process."""
        if engine not in self._bandwidth:
            self._bandwidth[engine] = _measured_bandwidth(device_of(engine))
        return self._bandwidth[engine]

    def table(self) -> str:
        """Text: a line for each kernel, slowest first, and one for all."""
        from ..cli.text import milliseconds, table

        rows = [self._row(kernel) for kernel in sorted(self.kernels, key=lambda kernel: -kernel.seconds)]
        headings = ["kernel", "engine", "family", "dispatches", "ms", "each", "share", "MB", "GB/s", "of floor"]
        text = table([*headings, "encode ms"], rows)
        untimed = sum(kernel.dispatches - kernel.timed for kernel in self.kernels)
        notes = [
            f"{milliseconds(self.seconds)} ms on the device, {self.bytes / 1e6:.1f} MB; floor: "
            + (
                ", ".join(
                    f"{engine} {self.bandwidth(engine) / 1e9:.1f} GB/s"
                    for engine in dict.fromkeys(kernel.engine for kernel in self.kernels)
                )
                or "none, as nothing ran"
            )
        ]
        if untimed:
            notes.append(f"{untimed} dispatches without a time: captured in a graph, or on a device without timestamps")
        return "\n".join([text, "", *notes])

    def _row(self, kernel: KernelProfile) -> list[str]:
        from ..cli.text import milliseconds

        start = [kernel.kernel, kernel.engine, kernel.family or "-", str(kernel.dispatches)]
        end = milliseconds(kernel.encode_seconds)
        if not kernel.seconds:
            return [*start, *["-"] * 6, end]
        return [
            *start,
            milliseconds(kernel.seconds),
            milliseconds(kernel.seconds / kernel.timed),
            f"{kernel.seconds / self.seconds:.0%}",
            f"{kernel.bytes / 1e6:.1f}",
            f"{kernel.bytes / kernel.seconds / 1e9:.1f}",
            f"{kernel.fraction(self.bandwidth(kernel.engine)):.0%}",
            end,
        ]

    def plot(self, path: str | os.PathLike | None = None):
        """Draws time by kernel, with the part of it that the floor takes.

        Args:
            path: where to write it, a name that ends in ".png", ".svg" or another that matplotlib knows; None: nowhere.

        Returns:
            The matplotlib Figure.

        Raises:
            ValueError: matplotlib is not installed, or does not know the ending. RuntimeError: the block has not ended.
        """
        from ._plot import check_path, draw

        check_path("profile: path", path)
        bars = [
            (kernel.kernel, kernel.seconds, kernel.bytes / self.bandwidth(kernel.engine))
            for kernel in self.kernels
            if kernel.seconds
        ]
        return draw([("", bars)], path)


def profile(memory_bandwidth: float | Mapping[str, float] | None = None) -> Profile:
    """Measures where the time of a `with` block goes, by kernel, in all threads of the process.

    While it runs every dispatch has a command encoder of its own, whose beginning and end the device notes: each
    costs microseconds more, and kernels do not overlap. On CUDA devices these are events on PyTorch's stream; what is
    captured in a graph has no times. All devices in use are waited for at the beginning and the end of the block.

    Args:
        memory_bandwidth: bytes per second that the floor stands for, of all devices or by engine ("native", "cuda",
            "mps"). None: measured when `table()`, `plot()` or `bandwidth()` first needs it, which takes a second or so.

    Returns:
        Profile: `kernels` (a KernelProfile each), `seconds`, `bytes`, `table()`, `plot(path)`.

    Raises:
        TypeError, ValueError: memory_bandwidth is no number above 0.

    Example:
        >>> with metal_moe.profile() as p:
        ...     metal_moe.fused_moe(x, w1, w2, router_logits, top_k=8)
        >>> print(p.table())
    """
    given = memory_bandwidth
    if given is None:
        return Profile({})
    if not isinstance(given, Mapping):
        given = dict.fromkeys(("native", "exact", "mps", *_cuda_engines()), given)
    for value in given.values():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            wrong_type("profile", "memory_bandwidth", f"of type {type(value).__name__}", "a number of bytes per second")
        if not value > 0:
            wrong_value("profile", "memory_bandwidth", value, "above 0")
    return Profile(given)


def device_of(engine: str) -> torch.device:
    """The device whose tensors the engine computes."""
    return torch.device(engine if engine.split(":")[0] in SUPPORTED_DEVICES else "cpu")


@functools.cache
def _measured_bandwidth(device: torch.device) -> float:
    return memory_bandwidth(device)[1]


def _cuda_engines() -> list[str]:
    return ["cuda", *(f"cuda:{index}" for index in range(1, torch.cuda.device_count()))]


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    if "mps" in SUPPORTED_DEVICES and torch.backends.mps.is_available():
        torch.mps.synchronize()


def _kernel(values: dict) -> KernelProfile:
    return KernelProfile(
        **{name: values[name] for name in ("engine", "family", "kernel", "dispatches", "timed", "bytes")},
        seconds=values["total_ns"] / 1e9,
        fastest=values["least_ns"] / 1e9,
        slowest=values["most_ns"] / 1e9,
        encode_seconds=values["encode_ns"] / 1e9,
    )
