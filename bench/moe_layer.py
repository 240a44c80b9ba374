"""Layers of real models beside PyTorch's own ways to compute them: time, fraction of the floor, ratio, error.

    python bench/moe_layer.py [--device cuda|mps] [--model mixtral qwen3 ...] [--tokens 1 4 16 ...] [--kernels]
        [--format affine4 ...] [--json FILE] [--plot FILE] [--compare FILE] [--load FILE]

The experts of a layer, given routes, without the shared ones; silu is the activation of all. Each implementation takes
another of several inputs in turn, so that weights come from memory and not from a cache. Times are medians: eager, as a
caller waits for them, and on CUDA devices also in a CUDA graph of all inputs. The floor is the larger of the bytes of
the experts hit over the memory bandwidth, and of the operations over the rate of a large matrix product of the same
dtype, both measured in the same run. docs/performance.md explains all of it. A result that is not within tolerance of
float64 ends the run with status 1.

With --format our weights are quantised, and the floor has their bytes; the others compute with the dense weights, but
for "metal_moe generic": the kernels that serve every format, in place of those compiled for this one; and for MLX's
gather_qmm, which on a CPU computes with ours where `mlx` is installed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import metal_moe
import torch
from layer_bench import ceilings, kernels, plot, report, result, verdict
from layer_bench.cases import INPUTS, Case, make_case, make_layer
from layer_bench.environment import environment
from layer_bench.measure import measure
from layer_bench.memory import free_memory
from layer_bench.outcome import exit_status
from metal_moe.cli.demo import TOLERANCES
from metal_moe.cli.text import DTYPES, Progress
from metal_moe.layers import FORMATS, MODELS, quantize

# What a device has the memory and the patience for.
DEFAULT_MODELS = {"cuda": list(MODELS), "mps": ["glm", "qwen3"], "cpu": ["glm", "qwen3"]}
DEFAULT_TOKENS = {
    "cuda": [1, 4, 16, 32, 128, 512, 4096],
    "mps": [1, 4, 16, 32, 128, 512],
    "cpu": [1, 4, 16, 32, 128],
}
# Seconds that one implementation's samples may take at one size.
DEFAULT_BUDGET = {"cuda": 0.4, "mps": 1.0, "cpu": 2.0}

T = TypeVar("T")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = torch.device(metal_moe.SUPPORTED_DEVICES[0])
    parser.add_argument("--device", type=torch.device, default=default, help=f"cpu, cuda or mps (default: {default})")
    parser.add_argument("--model", choices=MODELS, nargs="+", help="default: all on cuda, else glm and qwen3")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1 to 128 (cpu), 512 (mps), 4096 (cuda)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--format", choices=FORMATS, help="of our weights (default: dense); affine: groups of 64; trellis: random codes"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on H and I (default: 1)")
    parser.add_argument("--kernel", help="force a family (default: the one selected for the device)")
    parser.add_argument("--rounds", type=int, default=2 * INPUTS, help="eager samples (default: %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds of samples per implementation and size, if fewer samples")
    parser.add_argument("--kernels", action="store_true", help="also the GPU time of each kernel (cuda)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full result")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw roofline and times (PNG, SVG, PDF)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="show the ratio to an earlier --json file")
    parser.add_argument("--load", type=Path, metavar="FILE", help="measure nothing: show and plot a --json file")
    options = parser.parse_args(arguments)
    kind = options.device.type
    if kind not in metal_moe.SUPPORTED_DEVICES:
        parser.error(f"--device is {options.device}; it must be {' or '.join(metal_moe.SUPPORTED_DEVICES)}")
    if options.kernels and kind != "cuda":
        parser.error(f"--kernels with --device {kind}: PyTorch's profiler times each kernel with --device cuda alone")
    options.model = list(dict.fromkeys(options.model or DEFAULT_MODELS[kind]))
    options.tokens = list(dict.fromkeys(options.tokens or DEFAULT_TOKENS[kind]))
    options.budget = DEFAULT_BUDGET[kind] if options.budget is None else options.budget
    for name, least in (("tokens", 1), ("rounds", 3)):
        value = min(options.tokens) if name == "tokens" else options.rounds
        if value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    for name in ("scale", "budget"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} is {getattr(options, name)}; it must be above 0")
    for name in ("json", "plot"):  # minutes before anything is written
        path = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            parser.error(f"--{name} is {path}; there is no folder {path.absolute().parent}")
    return options


def run(options: argparse.Namespace, progress: Progress) -> dict:
    """Measures all that was asked for: the result, as --json writes it."""
    device, dtype = options.device, DTYPES[options.dtype]
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    progress("measuring memory bandwidth and matmul rate")
    measured = ceilings.measure_ceilings(dtype, device)

    def each_case(function: Callable[[Case], T]) -> list[T]:
        found = []
        for model in options.model:
            found += each_size(model, function)
            free_memory(device)  # what is left of one layer, before the next is drawn
        return found

    def each_size(model: str, function: Callable[[Case], T]) -> list[T]:
        progress(f"{model}: drawing weights")
        layer = make_layer(model, options.scale, dtype, device)
        quantized = None
        if options.format:
            progress(f"{model}: quantising")
            quantized = quantize(layer, options.format)
        found = []
        for tokens in options.tokens:
            progress(f"{model}: {tokens} tokens")
            found.append(function(make_case(layer, tokens, quantized)))
        return found

    rows = each_case(
        lambda case: measure(case, measured, kernel=options.kernel, rounds=options.rounds, budget=options.budget)
    )
    by_kernel: list[dict] = []
    if options.kernels:
        # After all times: a profiler that has once been attached may slow what follows.
        progress("time of each kernel")
        by_kernel = sum(each_case(lambda case: kernels.breakdown(case, measured, options.kernel)), [])
    return {
        "format": result.FORMAT,
        **environment(device),
        "dtype": options.dtype,
        "weights": options.format or options.dtype,
        "scale": options.scale,
        "kernel": options.kernel,
        "inputs": INPUTS,
        "tolerance": TOLERANCES[options.dtype],
        "ceilings": asdict(measured),
        "results": rows,
        "kernels": by_kernel,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.plot:
            plot.require(options.plot)
        earlier = result.read(options.compare) if options.compare else None
        if options.load:
            measured = result.read(options.load)
        else:
            with Progress() as progress:
                measured = run(options, progress)
        # Before anything that may fail: minutes went into it.
        if options.json:
            result.write(measured, options.json)
        print(report.render(measured, earlier))
        if options.plot:
            plot.draw(measured, options.plot)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"moe_layer: {error}", file=sys.stderr)
        return 1
    return exit_status(verdict.failures(measured))


if __name__ == "__main__":
    sys.exit(main())
