"""Small operations beside PyTorch's: microseconds of `matmul` and `lora` on one device.

    python bench/linear.py [--device cuda] [--size 64x64 64x256 1024x1024 ...] [--dtype bf16 ...] [--rank 16]
        [--tokens 1 16 64] [--json FILE]

matmul: "64x256" is [64, 256] by [256, 256]; `b` as it is (nn) and as the transpose of a stored matrix (nt). Ours is
our kernel, whatever the table says; "runs" is what `matmul` would choose here. lora: "64x256" adds an adapter from 256
to 256 to each of --tokens; PyTorch's is addmm(base, x A^T, B^T), and with an adapter for each token gathered A and B in
batched products.

Two times: of a call that its caller waits for, and of one of many in a row, which is what a program pays that waits at
its end; on the CPU they are the same. Medians; the two implementations run in turn. A result that is not within
tolerance of float64 ends the run with status 1, as does another kernel than the one that was asked for.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import metal_moe
import torch
from layer_bench import result
from layer_bench.environment import environment
from layer_bench.outcome import exit_status
from metal_moe.cli.demo import TOLERANCES
from metal_moe.cli.text import DTYPES, Progress, table
from metal_moe.reference import relative_error
from metal_moe.timing import synchronize
from torch import Tensor

SIZES = ["64x64", "64x256", "1024x1024"]
# Calls in a row at most, of which one is timed: launches overlap with what runs.
IN_A_ROW = 50
# Adapters of the operation with one for each token.
ADAPTERS = 8

Call = Callable[[], Tensor]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device(metal_moe.SUPPORTED_DEVICES[0]))
    parser.add_argument("--size", nargs="+", default=SIZES, help=f"rows x columns of a (default: {' '.join(SIZES)})")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16", "fp32"], help="(default: bf16 fp32)")
    parser.add_argument("--rank", type=int, default=16, help="of lora (default: 16)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64], help="of lora (default: 1 16 64)")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per line and implementation (default: 0.3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full result")
    options = parser.parse_args(arguments)
    for size in options.size:
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
            parser.error(f"--size is {size}; it must be of the form 64x256")
    if options.device.type not in metal_moe.SUPPORTED_DEVICES:
        parser.error(f"--device is {options.device}; it must be {' or '.join(metal_moe.SUPPORTED_DEVICES)}")
    if not 1 <= options.rank <= 256:
        parser.error(f"--rank is {options.rank}; it must be from 1 to 256")
    if min(options.tokens) < 1:
        parser.error(f"--tokens is {min(options.tokens)}; it must be at least 1")
    if not options.budget > 0:
        parser.error(f"--budget is {options.budget}; it must be above 0")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json is {options.json}; there is no folder {options.json.absolute().parent}")
    return options


def double(value: Tensor) -> Tensor:
    """On the CPU: MPS has no float64."""
    return value.cpu().double()


def times(calls: dict[str, Call], device: torch.device, budget: float) -> dict[str, dict[str, float]]:
    """Microseconds of a call that is waited for ("wait") and of one of many ("row"), by implementation."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wait": [], "row": []} for name in calls}
    in_a_row: dict[str, int] = {}
    for name, call in calls.items():
        call()  # compiles, allocates
        in_a_row[name] = max(1, min(IN_A_ROW, int(budget / 3 / _elapsed(call, device, 1))))
    end = time.perf_counter() + budget * len(calls)
    while time.perf_counter() < end or min(len(one["row"]) for one in seconds.values()) < 3:
        for name, call in calls.items():
            seconds[name]["wait"].append(_elapsed(call, device, 1))
            seconds[name]["row"].append(_elapsed(call, device, in_a_row[name]))
    return {
        name: {kind: statistics.median(values) * 1e6 for kind, values in one.items()} for name, one in seconds.items()
    }


def _elapsed(call: Call, device: torch.device, count: int) -> float:
    """Seconds of one of `count` calls, after which the device is waited for."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


def line(
    options: argparse.Namespace, operation: str, what: str, dtype: str, calls: dict[str, Call], expected: Tensor
) -> dict:
    errors = {name: relative_error(call().cpu(), expected) for name, call in calls.items()}
    calls["metal_moe"]()
    ran = metal_moe.last_dispatch()
    found = times(calls, options.device, options.budget)
    return {
        "operation": operation,
        "case": what,
        "dtype": dtype,
        "microseconds": found,
        "ratio": {kind: found["torch"][kind] / found["metal_moe"][kind] for kind in ("wait", "row")},
        "relative_error": errors,
        "family": ran["family"],
        "kernels": ran["kernels"],
    }


def products(options: argparse.Namespace, size: str, dtype: str) -> list[dict]:
    rows, columns = map(int, size.split("x"))
    a = torch.randn(rows, columns, device=options.device).to(DTYPES[dtype])
    stored = (torch.randn(columns, columns, device=options.device) * columns**-0.5).to(DTYPES[dtype])
    lines = []
    for layout, b in (("nn", stored), ("nt", stored.T)):
        calls: dict[str, Call] = {
            "metal_moe": lambda b=b: metal_moe.matmul(a, b, kernel="metal_moe"),
            "torch": lambda b=b: torch.matmul(a, b),
        }
        entry = line(options, "matmul", f"{size} {layout}", dtype, calls, double(a) @ double(b))
        metal_moe.matmul(a, b)
        entry["runs"] = metal_moe.last_dispatch()["family"]
        lines.append(entry)
    return lines


def adapters(options: argparse.Namespace, size: str, dtype: str) -> list[dict]:
    _, width = map(int, size.split("x"))
    device, kind = options.device, DTYPES[dtype]
    A = (torch.randn(ADAPTERS, options.rank, width, device=device) * width**-0.5).to(kind)
    B = (torch.randn(ADAPTERS, width, options.rank, device=device) * options.rank**-0.5).to(kind)
    lines = []
    for tokens in options.tokens:
        x = torch.randn(tokens, width, device=device).to(kind)
        base = torch.randn(tokens, width, device=device).to(kind)
        ids = torch.arange(tokens, device=device) % ADAPTERS

        def gathered(x=x, base=base, ids=ids) -> Tensor:
            s = torch.bmm(A[ids], x.unsqueeze(2))
            return torch.baddbmm(base.unsqueeze(2), B[ids], s, alpha=0.5).squeeze(2)

        one: dict[str, Call] = {
            "metal_moe": lambda x=x, base=base: metal_moe.lora(x, A[0], B[0], 0.5, base),
            "torch": lambda x=x, base=base: torch.addmm(base, x @ A[0].T, B[0].T, alpha=0.5),
        }
        own: dict[str, Call] = {
            "metal_moe": lambda x=x, base=base, ids=ids: metal_moe.lora(x, A, B, 0.5, base, adapter_ids=ids),
            "torch": gathered,
        }
        expected = double(base) + 0.5 * (double(x) @ double(A[0]).T) @ double(B[0]).T
        lines.append(line(options, "lora", f"{tokens}x{width} r{options.rank}", dtype, one, expected))
        s = torch.einsum("ti,tri->tr", double(x), double(A[ids]))
        expected = double(base) + 0.5 * torch.einsum("tr,tor->to", s, double(B[ids]))
        lines.append(line(options, "lora by token", f"{tokens}x{width} r{options.rank}", dtype, own, expected))
    for entry in lines:
        entry["runs"] = entry["family"]
    return lines


def run(options: argparse.Namespace, progress: Progress) -> dict:
    lines = []
    for dtype in dict.fromkeys(options.dtype):
        for size in dict.fromkeys(options.size):
            progress(f"matmul {size} {dtype}")
            lines += products(options, size, dtype)
        for size in dict.fromkeys(options.size):
            progress(f"lora {size} {dtype}")
            lines += adapters(options, size, dtype)
    return {
        "format": result.FORMAT,
        **environment(options.device),
        "tolerances": {dtype: TOLERANCES[dtype] for dtype in options.dtype},
        "results": lines,
    }


def render(measured: dict) -> str:
    def microseconds(value: float) -> str:
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"

    rows = []
    for one in measured["results"]:
        ours, theirs = one["microseconds"]["metal_moe"], one["microseconds"]["torch"]
        cells = [f"{microseconds(ours[kind])}" for kind in ("wait", "row")]
        cells += [f"{microseconds(theirs[kind])}" for kind in ("wait", "row")]
        cells += [f"{one['ratio'][kind]:.2f}x" for kind in ("wait", "row")]
        error = one["relative_error"]["metal_moe"]
        rows.append([one["operation"], one["case"], one["dtype"], one["family"], *cells, one["runs"], f"{error:.1e}"])
    headings = ["operation", "case", "dtype", "kernel", "us", "in a row", "PyTorch us", "in a row"]
    headings += ["ratio", "in a row", "runs", "error"]
    device = measured["device"]["name"]
    return f"{device}, microseconds per operation; ratio: PyTorch's time over ours\n\n{table(headings, rows)}"


def failures(measured: dict) -> list[str]:
    found = []
    for one in measured["results"]:
        what = f"{one['operation']} {one['case']} {one['dtype']}"
        for name, error in one["relative_error"].items():
            # PyTorch rounds what is between lora's products.
            limit = measured["tolerances"][one["dtype"]] * (1 if name == "metal_moe" else 4)
            if not error <= limit:
                found.append(f"{what}: error of {name} is {error:.1e}; the limit is {limit:g}")
        if one["family"] not in ("gemv", "tile"):
            found.append(f"{what}: {one['family']} ran; it must be one of our kernels")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with Progress() as progress:
            measured = run(options, progress)
        if options.json:
            result.write(measured, options.json)
        print(render(measured))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"linear: {error}", file=sys.stderr)
        return 1
    return exit_status(failures(measured))


if __name__ == "__main__":
    sys.exit(main())
