"""Measures on this machine where one kernel family takes over from the next, and up to which size `matmul` runs our
kernel instead of PyTorch's, and keeps the result in a table that every later run reads.

Layers of published models, with random weights: every family at every number of tokens, each call with other routes
than the last, so that weights come from memory. The thresholds of a layer are those with the least time over all
numbers of tokens, on a logarithmic scale; layers that were not measured use those that are best for all that were. The
defaults stay where they are within 2% of the best.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

import metal_moe

from .. import _core, layers, tuning
from ..formats import QuantizedExperts
from ..timing import median_seconds
from ..tuning import THRESHOLDS, UNLIMITED, LayerRecord, Record
from .demo import best_device
from .text import DTYPES, Bar, Progress, table

NAME = "tune"
HELP = "measure which kernels are fastest here, and remember it"

# In the order in which they take over from each other.
FAMILIES = ("moe_decode", "moe_prefill4", "moe_base", "moe_large_batch")
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128]
# Distinct routes in turn.
INPUTS = 4
# decode reads the weights of every assignment: beyond this many times the best family it does not come back.
HOPELESS = 3.0
# Of the time: less is noise, and no reason to leave the defaults.
WORTHWHILE = 0.02
# Of large_batch: rows of a tile over the mean rows per expert, and the largest tile.
ROW_TILES = [(per_mean, largest) for largest in (32, 64, 128) for per_mean in (0.75, 1.0, 1.5, 2.5)]

# Products of a few rows and of many, from a launch's worth of work to milliseconds: M, then K = N.
MATMUL_ROWS = (1, 16, None)
MATMUL_SIZES = (16, 32, 64, 128, 256, 512, 1024)

Seconds = dict[int, dict[str, float]]
"""By tokens, by family."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="a device of PyTorch (default: the best one supported here)")
    parser.add_argument("--show", action="store_true", help="measure nothing: show what holds on the device")
    parser.add_argument("--reset", action="store_true", help="forget what was measured on the device")
    parser.add_argument(
        "--model", choices=layers.MODELS, nargs="+", default=["qwen3", "glm"], help="(default: qwen3 glm)"
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="(default: bf16)")
    parser.add_argument(
        "--format",
        choices=["dense", *layers.FORMATS],
        nargs="+",
        default=["dense"],
        help="of weights (default: dense); trellis: random codes",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="(default: 1 to 128)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on H and I (default: 1)")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds per measurement (default: %(default)s)")
    parser.add_argument("--only", choices=["layers", "matmul"], help="measure the one, keep what is known of the other")


def run(options: argparse.Namespace, progress: Progress) -> dict:
    if options.show and options.reset:
        raise ValueError("--show and --reset are given; it must be one of them")
    if min(options.tokens) < 1:
        raise ValueError(f"--tokens is {min(options.tokens)}; it must be at least 1")
    for name in ("scale", "budget"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be above 0")
    device = best_device() if options.device is None else torch.device(options.device)
    information = metal_moe.device_info(device)
    engine, name = information["engine"], information["name"]
    file = tuning.path()
    if file is None:
        raise ValueError(f"{tuning.PATH_VARIABLE} is empty, which means no table; it must be a path, or not be set")
    records = tuning.read(file)
    found: Record = next((one for one in records if tuning.is_of(one, name)), {})
    if options.show:
        return _result("show", file, engine, name, found)
    others = [one for one in records if one.get("device") != name]
    if options.reset:
        if len(others) != len(records):
            tuning.write(file, others)
        tuning.apply(engine, name)
        return _result("reset", file, engine, name, {})
    record: Record = {
        "device": name,
        "engine": engine.partition(":")[0],
        "version": metal_moe.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": metal_moe.get_num_threads(),
        "layers": found.get("layers", []),
        "matmul": found.get("matmul", {}),
    }
    try:
        if options.only != "matmul":
            record["layers"] = _tune_layers(engine, device, options, record["layers"], progress)
        if options.only != "layers":
            record["matmul"] = {**record["matmul"], **_tune_matmul(engine, device, options, progress)}
        tuning.write(file, [*others, record])
    finally:
        tuning.apply(engine, name)  # candidates were tried out; also where it was interrupted
    return _result("tune", file, engine, name, record)


def _result(action: str, file: Path, engine: str, name: str, record: Record) -> dict:
    limits = {name: tuning.default_matmul_limit(engine, dtype) for name, dtype in DTYPES.items()}
    return {
        "action": action,
        "table": str(file),
        "device": name,
        "engine": engine,
        "measured": record.get("date"),
        "defaults": {**_core.default_tuning(engine), "matmul": limits},
        "layers": record.get("layers", []),
        "matmul": limits | record.get("matmul", {}),
    }


def render(result: dict) -> str:
    lines = [f"{result['device']}: {'measured ' + result['measured'] if result['measured'] else 'defaults'}"]
    if result["action"] == "reset":
        lines[0] += ", nothing is measured any more"

    def row(title: str, weights: str, entry: dict) -> list[str]:
        limits = ["-" if entry[name] == UNLIMITED else str(entry[name]) for name in THRESHOLDS]
        tile = f"{entry['row_tile_per_mean_rows']:g} x mean, at most {entry['largest_row_tile']}"
        return [title, weights, *limits, tile]

    rows = []
    for entry in result["layers"]:
        shape = f" {entry['hidden']} x {entry['intermediate']}" if entry["hidden"] else ""
        rows.append(row(f"{entry.get('model', '')}{shape}".strip(), entry.get("weights", entry["dtype"]), entry))
    rows.append(row("all others" if rows else "all", "-", result["defaults"]))
    headings = ["layer", "weights", "decode to", "prefill4 to", "base to", "row tile of large_batch"]
    lines += [table(headings, rows), "", "matmul runs our kernel up to so many multiply-adds: "]
    lines[-1] += ", ".join(f"{limit} ({dtype})" for dtype, limit in result["matmul"].items())
    lines.append(f"table: {result['table']}")
    return "\n".join(lines)


# --- layers ------------------------------------------------------------------------------------------------------


def _tune_layers(
    engine: str, device: torch.device, options: argparse.Namespace, known: list[LayerRecord], progress: Progress
) -> list[LayerRecord]:
    """The known layers, those measured now in place of earlier ones, and the entries for all other shapes."""
    measured = []
    tokens = sorted(set(options.tokens))
    for model, dtype in itertools.product(dict.fromkeys(options.model), dict.fromkeys(options.dtype)):
        shape = layers.MODELS[model] if options.scale == 1 else layers.MODELS[model].scaled(options.scale)
        shape = replace(shape, shared_experts=0)
        progress(f"{model}: drawing {shape.weight_bytes(DTYPES[dtype]) / 1e9:.2g} GB of weights")
        layer = layers.make_layer(shape, DTYPES[dtype], device)
        for weights in dict.fromkeys(options.format):
            w1, w2 = layer.w1, layer.w2
            bits = 8.0 * DTYPES[dtype].itemsize
            if weights != "dense":
                progress(f"{model}: quantising to {weights}")
                w1, w2 = layers.quantize(layer, weights)
                bits = (2 * w1.bits_per_weight + w2.bits_per_weight) / 3
            entry: LayerRecord = {
                "model": shape.name,
                "weights": dtype if weights == "dense" else weights,
                "hidden": shape.hidden,
                "intermediate": shape.intermediate,
                "experts": shape.experts,
                "top_k": shape.top_k,
                "dtype": dtype,
                "quantized": weights != "dense",
                "weight_bits": bits,
                "trellis": weights.startswith("trellis"),
            }
            call = _calls(layer, w1, w2, tokens)
            measured.append(_tune_layer(engine, device, options.budget, entry, tokens, call, progress))
            del call, w1, w2
        del layer
    places = {_place(entry) for entry in measured}
    every = [entry for entry in known if entry["hidden"] and _place(entry) not in places] + measured
    return every + _for_every_shape(engine, every)


def _place(entry: LayerRecord) -> tuple:
    names = ("hidden", "intermediate", "experts", "top_k", "dtype", "quantized", "weights")
    return tuple(entry.get(name) for name in names)


def _calls(
    layer: layers.Layer, w1: torch.Tensor | QuantizedExperts, w2: torch.Tensor | QuantizedExperts, tokens: list[int]
) -> Callable[[int, str | None], Callable[[], torch.Tensor]]:
    """call(tokens, family) gives a function that runs the layer, with the next of several routes each time."""
    inputs = {}
    for count in tokens:
        routed = []
        for seed in range(INPUTS):
            x = layer.hidden_states(count, seed)
            routed.append((x, *metal_moe.fused_topk(layer.router_logits(x), layer.shape.top_k, **layer.routing())))
        inputs[count] = routed

    def call(count: int, family: str | None) -> Callable[[], torch.Tensor]:
        turn = itertools.cycle(inputs[count])

        def once() -> torch.Tensor:
            x, weights, ids = next(turn)
            return metal_moe.fused_experts(x, w1, w2, weights, ids, kernel=family)

        return once

    return call


def _tune_layer(
    engine: str,
    device: torch.device,
    budget: float,
    entry: LayerRecord,
    tokens: list[int],
    call: Callable[[int, str | None], Callable[[], torch.Tensor]],
    progress: Progress,
) -> LayerRecord:
    defaults = _core.default_tuning(engine)
    bar = Bar(progress, f"{entry['model']} ({entry['weights']})")
    bar.begin(len(tokens) * len(FAMILIES))
    seconds: Seconds = {}
    hopeless = False
    for count in tokens:
        seconds[count] = {}
        for family in FAMILIES:
            if not (family == "moe_decode" and hopeless):
                seconds[count][family] = median_seconds(call(count, family), device, budget=budget)
            bar.add(1, f"{family.removeprefix('moe_')}, {count} tokens")
        fastest = min(seconds[count].values())
        hopeless = seconds[count].get("moe_decode", math.inf) > HOPELESS * fastest
    entry |= best_thresholds([seconds], defaults)
    entry |= {name: defaults[name] for name in ("row_tile_per_mean_rows", "largest_row_tile")}
    grouped = [count for count in tokens if count > entry["base_tokens"]]
    if grouped:
        entry |= _best_row_tile(engine, device, budget, entry, grouped, call, progress)
    entry["seconds"] = {str(count): times for count, times in seconds.items()}
    return entry


def best_thresholds(measured: list[Seconds], defaults: dict) -> dict[str, int]:
    """The thresholds with the least time over all layers and numbers of tokens, on a logarithmic scale.

    Between the last number of tokens of one family and the first of the next lies their geometric mean; a family that
    is best to the end has no limit. Equal inputs give equal thresholds; the defaults stay where the best are hardly
    better.
    """
    tokens = sorted({count for seconds in measured for count in seconds})

    def cost(family_of: Callable[[int], str]) -> float:
        return sum(
            math.log(times.get(family_of(count), math.inf)) for seconds in measured for count, times in seconds.items()
        )

    def by_limits(limits: Iterable[int]) -> Callable[[int], str]:
        names = list(zip(limits, FAMILIES, strict=False))
        return lambda count: next((family for limit, family in names if count <= limit), FAMILIES[-1])

    # One token is never grouped: its family is decode.
    edges = [1, *(count for count in tokens if count > 1)]
    best = min(itertools.combinations_with_replacement(edges, len(THRESHOLDS)), key=lambda one: cost(by_limits(one)))
    usual = [defaults[name] for name in THRESHOLDS]
    samples = sum(len(seconds) for seconds in measured)
    if cost(by_limits(usual)) - cost(by_limits(best)) <= WORTHWHILE * samples:
        return dict(zip(THRESHOLDS, usual, strict=True))
    return {name: _between(limit, tokens) for name, limit in zip(THRESHOLDS, best, strict=True)}


def _between(limit: int, tokens: list[int]) -> int:
    after = [count for count in tokens if count > limit]
    return math.isqrt(limit * after[0]) if after else UNLIMITED


def _best_row_tile(
    engine: str,
    device: torch.device,
    budget: float,
    entry: LayerRecord,
    tokens: list[int],
    call: Callable[[int, str | None], Callable[[], torch.Tensor]],
    progress: Progress,
) -> dict[str, float | int]:
    usual = (entry["row_tile_per_mean_rows"], entry["largest_row_tile"])
    candidates = list(dict.fromkeys([usual, *ROW_TILES]))
    bar = Bar(progress, f"{entry['model']} ({entry['weights']})")
    bar.begin(len(candidates) * len(tokens))
    costs = {}
    seen: dict[tuple[int, int], float] = {}  # by tokens and the tile that was taken: many candidates take the same
    for per_mean, largest in candidates:
        tried = {**entry, "row_tile_per_mean_rows": per_mean, "largest_row_tile": largest}
        _core.set_tuning_table(engine, tuning.layer_entries({"layers": [tried]}))
        cost = 0.0
        for count in tokens:
            once = call(count, FAMILIES[-1])
            once()
            place = (count, metal_moe.last_dispatch()["row_tile"])
            if place not in seen:
                seen[place] = median_seconds(once, device, budget=budget)
            cost += math.log(seen[place])
            bar.add(1, f"row tile {place[1]}, {count} tokens")
        costs[per_mean, largest] = cost
    _core.set_tuning_table(engine, [])
    best = min(costs, key=lambda one: costs[one])
    if costs[usual] - costs[best] <= WORTHWHILE * len(tokens):
        best = usual
    return {"row_tile_per_mean_rows": best[0], "largest_row_tile": best[1]}


def _for_every_shape(engine: str, entries: list[LayerRecord]) -> list[LayerRecord]:
    """An entry for layers of other shapes, for every dtype and format that was measured."""
    defaults = _core.default_tuning(engine)
    kinds: dict[tuple, list[LayerRecord]] = {}
    for entry in entries:
        kinds.setdefault((entry["dtype"], entry["quantized"], entry["weights"]), []).append(entry)
    found = []
    for (dtype, quantized, weights), same in kinds.items():
        seconds = [{int(count): times for count, times in one["seconds"].items()} for one in same]
        tiles = [(one["row_tile_per_mean_rows"], one["largest_row_tile"]) for one in same]
        per_mean, largest = max(tiles, key=tiles.count)  # the most frequent, the first of several
        entry: LayerRecord = {
            "model": "other shapes",
            "weights": weights,
            "hidden": 0,
            "intermediate": 0,
            "experts": 0,
            "top_k": 0,
            "dtype": dtype,
            "quantized": quantized,
            "weight_bits": sum(one["weight_bits"] for one in same) / len(same),
            "trellis": same[0].get("trellis", False),
            **best_thresholds(seconds, defaults),
            "row_tile_per_mean_rows": per_mean,
            "largest_row_tile": largest,
        }
        found.append(entry)
    return found


# --- matmul ------------------------------------------------------------------------------------------------------


def _tune_matmul(engine: str, device: torch.device, options: argparse.Namespace, progress: Progress) -> dict[str, int]:
    limits = {}
    for name in dict.fromkeys(options.dtype):
        shapes = {(rows or size, size) for rows in MATMUL_ROWS for size in MATMUL_SIZES}
        shapes = sorted(shapes, key=lambda shape: shape[0] * shape[1] ** 2)
        bar = Bar(progress, f"matmul ({name})")
        bar.begin(len(shapes))
        ratios = []
        for rows, size in shapes:
            a = torch.randn(rows, size, device=device).to(DTYPES[name])
            b = torch.randn(size, size, device=device).to(DTYPES[name])
            ours, theirs = (
                sum(_product_seconds(a, right, kernel, device, options.budget) for right in (b, b.T))
                for kernel in ("metal_moe", "torch")
            )
            ratios.append((rows * size * size, math.log(ours / theirs)))
            bar.add(1, f"{rows} x {size} by {size} x {size}")
        limits[name] = best_limit(ratios, tuning.default_matmul_limit(engine, DTYPES[name]))
    return limits


def _product_seconds(a: torch.Tensor, b: torch.Tensor, kernel: str, device: torch.device, budget: float) -> float:
    return median_seconds(lambda: metal_moe.matmul(a, b, kernel=kernel), device, budget=budget / 4, at_most=1000)


def best_limit(ratios: list[tuple[int, float]], default: int) -> int:
    """The number of multiply-adds up to which our kernel runs, so that the time over all products is least.

    `ratios`: multiply-adds, ascending, and the logarithm of our time over PyTorch's. The default stays where the best
    limit is hardly better.
    """

    def cost(limit: int) -> float:
        return sum(ratio for work, ratio in ratios if work <= limit)

    best = min([0, *(work for work, _ in ratios)], key=cost)
    return default if cost(default) - cost(best) <= WORTHWHILE * len(ratios) else best
