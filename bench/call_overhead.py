"""Where the time of one `fused_experts` call goes that is not in its kernels.

    python bench/call_overhead.py [--format affine4] [--rounds N] [--limit MICROSECONDS] [--flame FILE.svg]

The smallest layer (one token, H = I = 64, 4 experts, 2 per token), called from Python in a loop. --format: with
quantised weights, or with dense ones that are stored as a format ("dense"). Kernels are left out
by the stand-in's device that runs nothing, so that what is left is our own; the difference to the same call with
kernels is theirs. Each figure is the least mean of many short rounds: what else the machine does only ever adds.

--flame samples the call without kernels, Python and C++ frames together, with py-spy (`pip install py-spy`; it must be
allowed to trace a process). C++ names need an extension that was not stripped: configure with -DCMAKE_STRIP=/bin/true.
The exit status is 1 where the call takes more than --limit beside its kernels.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import metal_moe
import torch
from metal_moe import QuantizedExperts, _core, experts
from metal_moe.layers import FORMATS as QUANTIZED

HIDDEN = INTERMEDIATE = 64
EXPERTS, TOP_K = 4, 2
FORMATS = {"dense": {"format": "dense"}, **QUANTIZED}
CALLS_PER_ROUND = 50  # some hundred microseconds: most rounds meet nobody else
FLAME_SECONDS, SAMPLES_PER_SECOND = 15, 400


def least_mean(function: Callable[[], object], rounds: int) -> float:
    """Seconds of a call in the best of `rounds` rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(CALLS_PER_ROUND):
            function()
        best = min(best, time.perf_counter() - start)
    return best / CALLS_PER_ROUND


def make_arguments(format: str | None = None) -> tuple[torch.Tensor | QuantizedExperts, ...]:
    generator = torch.Generator().manual_seed(0)
    weights, ids = metal_moe.fused_topk(torch.randn(1, EXPERTS, generator=generator), TOP_K)
    x = torch.randn(1, HIDDEN, generator=generator)
    w1 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator)
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator)
    if format:
        gate, up = w1.chunk(2, 1)
        w1, w2 = (QuantizedExperts.quantize(each, **FORMATS[format]) for each in ({"gate": gate, "up": up}, w2))
    return x, w1, w2, weights, ids


def measure(rounds: int, format: str | None = None) -> dict[str, float]:
    """Seconds by what they are of."""
    arguments = make_arguments(format)
    hidden_states = arguments[0]
    call = metal_moe.fused_experts
    times = {"with kernels": least_mean(lambda: call(*arguments), rounds)}
    _core.set_cpu_engine_null(True)
    try:
        call(*arguments)  # the first of its kind on this device
        times["call"] = least_mean(lambda: call(*arguments), rounds)
        times["extension"] = least_mean(lambda: experts.fused_experts.known_call(*arguments), rounds)
        times["output"] = least_mean(
            lambda: torch.empty_like(hidden_states, memory_format=torch.contiguous_format), rounds
        )
        times["checked"] = least_mean(lambda: call.__wrapped__(*arguments), rounds)
        if not format:
            times["dispatcher"] = least_mean(lambda: torch.ops.metal_moe.fused_experts(*arguments), rounds)
        times["loop"] = least_mean(lambda: None, rounds)
    finally:
        _core.set_cpu_engine_null(False)
    return times


def report(times: dict[str, float]) -> str:
    call = times["call"] - times["loop"]
    extension = times["extension"] - times["loop"]
    output = times["output"] - times["loop"]
    lines = [
        ("one call, kernels left out", call),
        ("  Python function: modes of torch.compile, arguments handed on", call - extension),
        ("  torch.empty_like for the output", output),
        ("  extension: other modes, arguments, encode, commit, wait", extension - output),
        ("kernels, and what waiting for them adds", times["with kernels"] - times["call"]),
        ("the same call, unlike any earlier one: checked in Python", times["checked"] - times["loop"]),
    ]
    if "dispatcher" in times:
        torch_ops = "the same call through torch.ops, as torch.compile makes it"
        lines.append((torch_ops, times["dispatcher"] - times["loop"]))
    return "\n".join(f"{name:<66}{seconds * 1e6:8.2f} us" for name, seconds in lines)


def call_for_ever(format: str | None) -> None:
    """The process that is sampled."""
    arguments = make_arguments(format)
    _core.set_cpu_engine_null(True)
    call = metal_moe.fused_experts
    call(*arguments)
    print("ready", flush=True)
    while True:
        for _ in range(1000):
            call(*arguments)


def write_flame_graph(path: Path, format: str | None) -> None:
    """Of the call without kernels. RuntimeError where py-spy is not there or may not trace."""
    beside_python = str(Path(sys.executable).parent)
    py_spy = shutil.which("py-spy", path=beside_python) or shutil.which("py-spy")
    if py_spy is None:
        raise RuntimeError("--flame needs py-spy: pip install py-spy")
    command = [sys.executable, __file__, "--call-for-ever", *(["--format", format] if format else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sampled:
        try:
            if sampled.stdout.readline() != "ready\n":
                raise RuntimeError("the process to sample did not start")
            options = ["--native", "--rate", str(SAMPLES_PER_SECOND), "--duration", str(FLAME_SECONDS)]
            subprocess.run(
                [py_spy, "record", *options, "--output", str(path), "--pid", str(sampled.pid)],
                check=True,
                capture_output=True,
                text=True,
            )
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"py-spy: {error.stderr.strip()}") from error
        finally:
            sampled.kill()
    # py-spy writes its own command line there.
    weights = f", {format} weights" if format else ""
    title = f"One fused_experts call without its kernels{weights}: widths are shares of its time"
    path.write_text(re.sub(r'(<text id="title"[^>]*>)[^<]*', rf"\1{title}", path.read_text(), count=1))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, help="of the weights (default: dense tensors)")
    parser.add_argument("--rounds", type=int, default=2000, help="short rounds per figure (default: %(default)s)")
    parser.add_argument("--limit", type=float, metavar="MICROSECONDS", help="most that a call may take beside kernels")
    parser.add_argument("--flame", type=Path, metavar="FILE", help="write a flame graph of the call (SVG)")
    parser.add_argument("--call-for-ever", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    if sys.platform == "darwin":
        parser.error("there is no device that runs nothing on macOS")
    if options.call_for_ever:
        call_for_ever(options.format)
    times = measure(options.rounds, options.format)
    print(report(times))
    if options.flame:
        try:
            write_flame_graph(options.flame, options.format)
        except RuntimeError as error:
            print(f"call_overhead: {error}", file=sys.stderr)
            return 2
    overhead = (times["call"] - times["loop"]) * 1e6
    if options.limit is not None and overhead > options.limit:
        print(f"call_overhead: {overhead:.2f} us beside the kernels, the limit is {options.limit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
