"""The patterns in which a sequence of operations is dispatched, each timed and its results checked."""

import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import metal_moe
import torch
from layer_bench.cases import Call, Case
from layer_bench.check import Expected
from layer_bench.clock import Timing, timing
from metal_moe.timing import synchronize
from torch import Tensor

# As the patterns were first asked for.
COUNTS = (2, 4, 8)

PLAIN = "plain calls"
SYNCHRONOUS = "a wait after each"
AT_END = "one wait at the end"
BATCH = "LayerBatch"
HANDLER = "completion handler each"


def in_flight(count: int) -> str:
    return f"{count} command buffers in flight"


def encoders(count: int) -> str:
    return f"{count} encoders in a command buffer"


def one_encoder(count: int) -> str:
    return f"{count} operations in an encoder"


# Those that a caller may use in place of plain calls; the others show where the time goes.
ASYNCHRONOUS = (*map(in_flight, COUNTS), *map(one_encoder, COUNTS), AT_END, BATCH)

Pattern = Callable[[], list[Tensor]]


def operation(call: Call) -> Tensor:
    return metal_moe.fused_experts(*call)


def groups(calls: list[Call], count: int) -> Iterable[list[Call]]:
    for first in range(0, len(calls), count):
        yield calls[first : first + count]


class Patterns:
    """Functions that dispatch `calls`, wait for them and return the results."""

    def __init__(self, calls: list[Call], device: torch.device) -> None:
        self.calls, self.device = calls, device
        self.handled: list[tuple[float, float, float]] = []
        """Seconds of each command buffer with a handler: of commit(), from there to the device's start, and from the
        device's end to the handler."""
        self.streams: list[metal_moe.CommandStream] = []

    def stream(self, **policy: int) -> metal_moe.CommandStream:
        # Commits are the pattern's own.
        stream = metal_moe.CommandStream(self.device, max_dispatches=1 << 20, max_bytes=1 << 50, **policy)
        self.streams.append(stream)
        return stream

    def all(self) -> dict[str, Pattern]:
        found: dict[str, Pattern] = {PLAIN: self.plain, SYNCHRONOUS: self.waiting(self.stream())}
        owned = self.streams[0].owned
        if owned:
            found |= {in_flight(count): self.flying(self.stream(max_in_flight=count)) for count in COUNTS}
            found[HANDLER] = self.with_handlers(self.stream())
            for count in COUNTS:
                found[encoders(count)] = self.grouped(self.stream(), count, True)
                found[one_encoder(count)] = self.grouped(self.stream(), count, False)
        found[AT_END] = self.flying(self.stream(max_in_flight=64))
        if self.device.type == "cpu":
            found[BATCH] = self.batched
        return found

    def plain(self) -> list[Tensor]:
        results = [operation(call) for call in self.calls]
        synchronize(self.device)
        return results

    def waiting(self, stream: metal_moe.CommandStream) -> Pattern:
        def run() -> list[Tensor]:
            results = []
            with stream:
                for call in self.calls:
                    results.append(operation(call))
                    stream.synchronize()
            return results

        return run

    def flying(self, stream: metal_moe.CommandStream) -> Pattern:
        def run() -> list[Tensor]:
            results = []
            with stream:
                for call in self.calls:
                    results.append(operation(call))
                    stream.commit()
            stream.synchronize()
            return results

        return run

    def with_handlers(self, stream: metal_moe.CommandStream) -> Pattern:
        called = threading.Event()
        reported: list[tuple[float, metal_moe.Completion]] = []

        def handler(completion: metal_moe.Completion) -> None:
            reported.append((time.perf_counter(), completion))
            called.set()

        def run() -> list[Tensor]:
            results = []
            with stream:
                for call in self.calls:
                    called.clear()
                    results.append(operation(call))
                    stream.on_completed(handler)
                    start = time.perf_counter()
                    stream.commit()
                    committed = time.perf_counter()
                    called.wait()
                    now, completion = reported.pop()
                    self.handled.append(
                        (committed - start, max(0.0, completion.gpu_start - committed), now - completion.gpu_end)
                    )
            return results

        return run

    def grouped(self, stream: metal_moe.CommandStream, count: int, separate: bool) -> Pattern:
        def run() -> list[Tensor]:
            results = []
            with stream:
                for some in groups(self.calls, count):
                    for call in some:
                        results.append(operation(call))
                        if separate:
                            stream.end_encoder()
                    stream.synchronize()
            return results

        return run

    def batched(self) -> list[Tensor]:
        with metal_moe.LayerBatch(len(self.calls)):
            return [operation(call) for call in self.calls]

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


def time_patterns(
    found: dict[str, Pattern], handled: list, device: torch.device, operations: int, rounds: int
) -> dict[str, Timing]:
    """Seconds per operation. The patterns take turns, so that what disturbs the machine disturbs all of them."""
    samples: dict[str, list[float]] = {name: [] for name in found}
    for number in range(-1, rounds):  # the first one warms up
        for name, run in found.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            if number >= 0:
                samples[name].append((time.perf_counter() - start) / operations)
        if number < 0:
            handled.clear()
    return {name: timing(values) for name, values in samples.items()}


def time_parts(case: Case, rounds: int) -> dict[str, Timing]:
    """Seconds of the router (its matrix product and the choice), of the experts, and of both in a row, as a caller
    waits for them."""
    shape = case.shape

    def router(x: Tensor) -> tuple[Tensor, Tensor]:
        return metal_moe.fused_topk(case.layer.router_logits(x), shape.top_k, **case.layer.routing())

    parts: list[tuple[float, float, float]] = []
    for number in range(-1, rounds):
        for call in case.calls:
            marks = [time.perf_counter()]
            for part in (lambda: router(call[0]), lambda: operation(call)):  # noqa: B023 (called at once)
                part()
                synchronize(case.device)
                marks.append(time.perf_counter())
            if number >= 0:
                parts.append((marks[1] - marks[0], marks[2] - marks[1], marks[2] - marks[0]))
    names = ("router", "experts", "router_and_experts")
    return {name: timing(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}


def error(call: Call, out: Tensor) -> float:
    """Against float64, which MPS devices do not have."""
    if out.device.type == "mps":
        x, w1, w2, weights, ids = (tensor.cpu() for tensor in call)
        call, out = (x, w1, w2, weights, ids), out.cpu()
    return Expected(call).error(out)


def measure(case: Case, operations: int, rounds: int) -> dict:
    """The row of a result."""
    calls = [case.calls[i % len(case.calls)] for i in range(operations)]
    expected = Patterns(calls, case.device).plain()
    ran = metal_moe.last_dispatch()
    patterns = Patterns(calls, case.device)
    try:
        found = patterns.all()
        wrong = [
            name
            for name, run in found.items()
            if not all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))
        ]
        times = time_patterns(found, patterns.handled, case.device, operations, rounds)
        owned = patterns.streams[0].owned
        no_ops = list(patterns.streams[0].no_ops)
    finally:
        patterns.close()
    parts = time_parts(case, rounds)
    handled = [statistics.median(column) for column in zip(*patterns.handled, strict=True)]
    return {
        "model": case.shape.name,
        "tokens": case.tokens,
        "family": ran["family"],
        "dispatches": ran["dispatches"],
        "owned_stream": owned,
        "no_ops": no_ops,
        "relative_error": error(case.calls[0], expected[0]),
        "different": wrong,
        "seconds": {name: one.median for name, one in times.items()},
        "timings": {name: asdict(one) for name, one in times.items()},
        "handlers": dict(zip(("commit", "start", "callback"), handled, strict=True)) if handled else None,
        "layer": {name: asdict(one) for name, one in parts.items()},
    }
