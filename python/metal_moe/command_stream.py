"""Streams of command buffers that the caller commits and waits for."""

import atexit
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import _core
from ._operator import engine_of_device
from ._validate import DEFAULT_DEVICE, SUPPORTED_DEVICES, check_int, choices, wrong_type, wrong_value

__all__ = ["CommandStream", "Completion"]

# As the core's own default (csrc/core/command_stream.h says why).
MAX_IN_FLIGHT = 3
MAX_DISPATCHES = 64
MAX_BYTES = 256 << 20

# What does nothing where PyTorch commits: it has its own command buffers, or none.
_OF_OWNED_STREAMS = ("commit", "check", "cancel", "end_encoder", "max_in_flight", "max_dispatches", "max_bytes")


class Completion(NamedTuple):
    """What a completion handler is told of its command buffer."""

    gpu_start: float
    """Seconds on the clock of `time.perf_counter()` at which the device began with it."""
    gpu_end: float
    """The same for its end."""
    error: str | None
    """What failed, with the names of the kernels; None where nothing did."""


class CommandStream:
    """A stream of command buffers: inside `with stream:` operations are encoded, and not waited for.

    For tensors of the stream's device, on the thread that has entered it. Operations run in the order in which they
    were encoded, and their results are there after `synchronize()`; until then nothing but other operations of this
    stream may read them or write what they read. The stream keeps all these tensors alive. It commits when
    `max_dispatches` or `max_bytes` are encoded, at the end of the `with` block, and when asked.

    An operation that is refused (an exception) leaves the others as they are. A command buffer that fails is reported
    by the next `synchronize()` or `check()`, with the names of its kernels; those before and after it run.

    The methods may be called by several threads, each call by itself; a completion handler must not call them. When the
    interpreter exits, open streams are closed: what is not committed is dropped, and what is committed waited for. In
    the child of a fork the parent's streams raise RuntimeError.

    CUDA devices: operations run on PyTorch's current stream as ever, `synchronize()` waits for that stream, and
    `no_ops` names what does nothing. MPS devices: the stream has a queue of its own beside PyTorch's; entering it waits
    for what PyTorch has been given, and PyTorch must not use its tensors before `synchronize()`.

    Args:
        device: of the tensors. On the CPU, of the engine that METAL_MOE_CPU_ENGINE names when the stream is made.
        max_in_flight: committed command buffers that have not completed, at most: `commit()` waits for the oldest
            beyond it, so that a caller does not run ahead of the device without bound. From 1.
        max_dispatches: commit an operation's command buffer once it holds so many dispatches. From 1.
        max_bytes: or once its dispatches read and write so many bytes. From 1.

    Raises:
        TypeError, ValueError: a wrong argument. RuntimeError: the kernel library cannot be loaded.

    Example:
        >>> stream = metal_moe.CommandStream()
        >>> with stream:
        ...     y = metal_moe.fused_moe(x, w1, w2, router_logits, top_k=2)
        >>> stream.synchronize()  # y is there
    """

    def __init__(
        self,
        device: str | torch.device = DEFAULT_DEVICE,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        max_dispatches: int = MAX_DISPATCHES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        op = "CommandStream"
        device = torch.device(device)
        if device.type not in SUPPORTED_DEVICES:
            wrong_value(op, "device", f'"{device}"', choices(SUPPORTED_DEVICES))
        check_int(op, "max_in_flight", max_in_flight, 1, 64)
        check_int(op, "max_dispatches", max_dispatches, 1, 1 << 20)
        check_int(op, "max_bytes", max_bytes, 1, 1 << 50)
        self._device = device
        self._core = None
        self._closed = False
        self._entered = threading.local()
        if device.type != "cuda":
            self._core = _core.CommandStream(engine_of_device(device), max_in_flight, max_dispatches, max_bytes)
        _open.add(self)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def owned(self) -> bool:
        """Whether it has a queue of its own; otherwise PyTorch's current stream is used."""
        return self._core is not None

    @property
    def no_ops(self) -> tuple[str, ...]:
        """Methods and arguments that do nothing on this device."""
        return () if self.owned else _OF_OWNED_STREAMS

    def __enter__(self) -> "CommandStream":
        self._refuse_closed("enter")
        if self._core is None:
            return self
        if self._device.type == "mps":
            torch.mps.synchronize()
        batch = self._core.batch()
        batch.enter()
        if not hasattr(self._entered, "batches"):
            self._entered.batches = []
        self._entered.batches.append(batch)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Commits what is encoded, after an exception too."""
        if self._core is None:
            return
        leave(self._entered.batches.pop(), error)

    def commit(self) -> None:
        """Commits what is encoded, if anything. Waits where `max_in_flight` command buffers are on their way."""
        self._refuse_closed("commit")
        if self._core is not None:
            self._core.commit()

    def synchronize(self) -> None:
        """Commits, and waits for all command buffers and their handlers.

        Raises:
            RuntimeError: one has failed since the last call; the message names its kernels.
        """
        self._refuse_closed("synchronize")
        if self._core is not None:
            self._core.synchronize()
        else:
            torch.cuda.current_stream(self._device).synchronize()

    def check(self) -> None:
        """Raises what `synchronize()` would, of what is known by now; waits for nothing."""
        self._refuse_closed("check")
        if self._core is not None:
            self._core.check()

    def cancel(self) -> int:
        """Drops what is encoded and not committed, and returns how many dispatches: their results are undefined. What
        is committed runs."""
        self._refuse_closed("cancel")
        return 0 if self._core is None else self._core.cancel()

    def end_encoder(self) -> None:
        """What is encoded next goes to another encoder of the same command buffer (for measuring what that costs)."""
        self._refuse_closed("end_encoder")
        if self._core is not None:
            self._core.end_encoder()

    def on_completed(self, handler: Callable[[Completion], object]) -> None:
        """Calls `handler(completion)` when the command buffer being encoded has completed, failed or not.

        On a thread of the stream, in the order of the command buffers; `synchronize()` returns after it. An exception
        that it raises is reported like a failed command buffer.

        Raises:
            TypeError: not callable. RuntimeError: PyTorch's stream, which tells nobody (`owned`).
        """
        self._refuse_closed("on_completed")
        if not callable(handler):
            wrong_type("on_completed", "handler", f"of type {type(handler).__name__}", "callable")
        if self._core is None:
            raise RuntimeError(f"on_completed: work on {self._device} runs on PyTorch's stream, which has no handlers")
        self._core.on_completed(lambda start, end, error: handler(Completion(start, end, error)))

    @property
    def in_flight(self) -> int:
        """Command buffers that are committed and have not completed."""
        self._refuse_closed("in_flight")
        return 0 if self._core is None else self._core.in_flight

    @property
    def pending_dispatches(self) -> int:
        """Dispatches that are encoded and not committed."""
        self._refuse_closed("pending_dispatches")
        return 0 if self._core is None else self._core.pending_dispatches

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Drops what is encoded and not committed, and waits for the rest and its handlers. A second call does nothing;
        every other method then raises RuntimeError. Failures that nobody has asked for are lost."""
        if self._core is not None:
            self._core.close()
        self._closed = True
        _open.discard(self)

    def _refuse_closed(self, op: str) -> None:
        if self._closed:
            raise RuntimeError(f"{op}: the stream is closed")


def leave(batch: _core.LayerBatch, error: BaseException | None) -> None:
    """Leaves a batch of the calling thread that was entered with `with`. What fails after `error`, which ended the
    block, becomes part of its context and does not take its place."""
    try:
        batch.leave()
    except RuntimeError as failure:
        if error is None:
            raise
        last = error
        while last.__context__ is not None and last.__context__ is not failure:
            last = last.__context__
        last.__context__ = failure


_open: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """While there still is an interpreter for handlers to run in."""
    for stream in list(_open):
        stream.close()
