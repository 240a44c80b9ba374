"""What it costs to wait for every command buffer, and what is gained by not waiting.

    python bench/async_dispatch.py [--device cuda] [--model glm ...] [--tokens 1 128] [--json FILE] [--plot FILE]

The experts of a layer, again and again, dispatched in five patterns on a stream with a queue of its own
(metal_moe.CommandStream):

1. synchronous: every operation in a command buffer of its own, waited for;
2. several command buffers in flight, at most 2, 4 or 8, waited for at the end;
3. completion handlers: what commit() costs, and how long after its end a command buffer is reported;
4. 2, 4 or 8 operations in one command buffer, in an encoder each and in one;
5. all operations in one LayerBatch, or one wait at the end, against a wait after each;

and the overlap potential of the layer: the part of its time that the router takes, which is what running it beside
something else could save at most. The verdict follows a rule: asynchronous dispatch is worth its complexity where it
makes operations at least 15% faster than plain calls, which wait on CPU tensors and do not on a GPU.

On CUDA devices PyTorch's stream is used, which takes operations one by one and has no command buffers: what does not
exist there is a dash. Every result is compared with that of a plain call, bit for bit, and that one with float64.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import metal_moe
import torch
from async_bench import patterns, report, verdict
from async_bench.plot import draw
from layer_bench import result as files
from layer_bench.cases import make_case, make_layer
from layer_bench.environment import environment
from layer_bench.outcome import exit_status
from layer_bench.plot import require
from metal_moe.cli.demo import TOLERANCES
from metal_moe.cli.text import DTYPES, Progress
from metal_moe.layers import MODELS

# H and I: the time of an operation is to be what it is in a model, except where that would take minutes.
DEFAULT_SCALE = {"native": 0.25, "exact": 1 / 32}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = torch.device(metal_moe.SUPPORTED_DEVICES[0])
    parser.add_argument("--device", type=torch.device, default=default, help=f"cpu, cuda or mps (default: {default})")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["glm"], help="default: glm")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="default: 1 128")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--scale", type=float, help="factor on H and I (default: 1; 1/4 on native, 1/32 on exact)")
    parser.add_argument("--operations", type=int, default=16, help="of a sample (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each pattern (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full result")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the patterns (PNG, SVG, PDF)")
    parser.add_argument("--load", type=Path, metavar="FILE", help="measure nothing: show and plot a --json file")
    options = parser.parse_args(arguments)
    if options.device.type not in metal_moe.SUPPORTED_DEVICES:
        parser.error(f"--device is {options.device}; it must be one of {', '.join(metal_moe.SUPPORTED_DEVICES)}")
    for name, least in (("tokens", 1), ("operations", 1), ("rounds", 3)):
        value = min(options.tokens) if name == "tokens" else getattr(options, name)
        if value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    if options.scale is not None and not options.scale > 0:
        parser.error(f"--scale is {options.scale}; it must be above 0")
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            parser.error(f"--{name} is {path}; there is no folder {path.absolute().parent}")
    options.model = list(dict.fromkeys(options.model))
    options.tokens = list(dict.fromkeys(options.tokens))
    return options


def run(options: argparse.Namespace, progress: Progress) -> dict:
    device, dtype = options.device, DTYPES[options.dtype]
    about = environment(device)
    scale = options.scale or DEFAULT_SCALE.get(about["device"]["engine"], 1.0)
    rows = []
    for model in options.model:
        progress(f"{model}: drawing weights")
        layer = make_layer(model, scale, dtype, device)
        for tokens in options.tokens:
            progress(f"{model}: {tokens} tokens")
            rows.append(patterns.measure(make_case(layer, tokens), options.operations, options.rounds))
    measured = {
        "format": files.FORMAT,
        "benchmark": "async_dispatch",
        **about,
        "dtype": options.dtype,
        "scale": scale,
        "operations": options.operations,
        "rounds": options.rounds,
        "tolerance": TOLERANCES[options.dtype],
        "threshold": verdict.THRESHOLD,
        "results": rows,
    }
    for row in rows:
        row["verdict"] = verdict.of(row)
    return measured


def read(path: Path) -> dict:
    result = files.read(path)
    if result.get("benchmark") != "async_dispatch":
        raise ValueError(f"{path} is not a result of async_dispatch")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.plot:
            require(options.plot)
        if options.load:
            measured = read(options.load)
        else:
            with Progress() as progress:
                measured = run(options, progress)
        if options.json:
            files.write(measured, options.json)
        print(report.render(measured))
        if options.plot:
            draw(measured, options.plot)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"async_dispatch: {error}", file=sys.stderr)
        return 1
    return exit_status(verdict.failures(measured))


if __name__ == "__main__":
    sys.exit(main())
