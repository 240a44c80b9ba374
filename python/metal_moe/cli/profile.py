"""Times every kernel of one MoE layer, with random weights, and says what fraction of the memory's speed it reaches.

Bytes are those of the experts that were chosen, each read once, and of what lies between the kernels. Inputs take
turns, so that weights come from memory as far as the experts of all of them exceed the caches. Profiling puts each
kernel into an encoder of its own: the sum is a little more than the layer takes by itself.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

import metal_moe

from .. import layers
from ..memory_bandwidth import memory_bandwidth
from ..profile import Profile
from ..profile._profile import device_of
from ..timing import median_seconds
from .demo import best_device
from .text import DTYPES, Progress, milliseconds, table

NAME = "profile"
HELP = "one layer of a model: time and fraction of the floor, kernel by kernel"

LAYERS = {shape.name.lower(): shape for shape in layers.MODELS.values()}
# Arguments of QuantizedExperts.quantize. The search for trellis codes takes too long.
FORMATS = {name: settings for name, settings in layers.FORMATS.items() if settings["format"] != "trellis"}
# Distinct inputs, in turn.
INPUTS = 8
# Seconds of repetition for each number of tokens.
BUDGET = 1.0


def token_counts(text: str) -> list[int]:
    """ "1,16,128" -> [1, 16, 128]"""
    counts = [int(word) for word in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{min(counts)} tokens; must be at least 1")
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer", choices=LAYERS, default="glm-4.7-flash", help="whose layer (default: %(default)s)")
    parser.add_argument("--tokens", type=token_counts, default=[1, 16, 128], help="per call (default: 1,16,128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and tokens (default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, help="quantise the weights (default: dense)")
    parser.add_argument("--device", help="a device of PyTorch (default: the best one supported here)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on H and I (default: 1)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as PNG, SVG or PDF (needs matplotlib)")


def run(options: argparse.Namespace, progress: Progress) -> dict:
    if not options.scale > 0:
        raise ValueError(f"--scale is {options.scale}; it must be above 0")
    if options.plot:
        from ..profile._plot import check_path

        check_path("--plot", options.plot)
    device = best_device() if options.device is None else torch.device(options.device)
    information = metal_moe.device_info(device)
    shape = LAYERS[options.layer]
    if options.scale != 1:
        shape = shape.scaled(options.scale)
    if options.format:  # kernels of quantised weights have no shared experts
        shape = replace(shape, shared_experts=0)
    progress("measuring memory bandwidth")
    measured, bandwidth = memory_bandwidth(device)
    dtype = DTYPES[options.dtype]
    progress(f"drawing {shape.weight_bytes(dtype) / 1e9:.2g} GB of weights")
    layer = layers.make_layer(shape, dtype, device)
    weights = (layer.w1, layer.w2)
    if options.format:
        progress(f"quantising to {options.format}")
        weights = tuple(metal_moe.QuantizedExperts.quantize(w, **FORMATS[options.format]) for w in weights)
    results = []
    for tokens in options.tokens:
        progress(f"{tokens} tokens")
        results.append(_measure(layer, weights, tokens, bandwidth))
    result = {
        "layer": {
            "name": shape.name,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "shared_experts": shape.shared_experts,
            "dtype": options.dtype,
            "format": options.format or "dense",
        },
        "device": information,
        "threads": metal_moe.get_num_threads(),
        "memory_bandwidth": bandwidth,
        "memory_bandwidth_of": measured,
        "results": results,
    }
    if options.plot:
        _draw(result, options.plot)
    return result


def _measure(layer: layers.Layer, weights: tuple, tokens: int, bandwidth: float) -> dict:
    shape, device = layer.shape, layer.w1.device
    inputs = [layer.hidden_states(tokens, seed) for seed in range(INPUTS)]
    logits = [layer.router_logits(x) for x in inputs]
    shared = {} if not shape.shared_experts else {"shared_w1": layer.shared_w1, "shared_w2": layer.shared_w2}

    def all_inputs() -> None:
        for x, each in zip(inputs, logits, strict=True):
            metal_moe.fused_moe(x, *weights, each, shape.top_k, **layer.routing(), **shared)

    seconds = median_seconds(all_inputs, device, budget=BUDGET, at_most=20) / INPUTS
    ran = metal_moe.last_dispatch()
    rounds = max(1, min(20, int(BUDGET / (seconds * INPUTS))))
    with metal_moe.profile(bandwidth) as profile:
        for _ in range(rounds):
            all_inputs()
    routes = [metal_moe.fused_topk(each, shape.top_k, **layer.routing())[1] for each in logits]
    used = sum(ids.unique().numel() for ids in routes) / INPUTS
    expert_bytes = _expert_bytes(layer, weights)
    experts = sum(expert_bytes.values())
    moved = (used + shape.shared_experts) * experts + 2 * tokens * shape.hidden * layer.dtype.itemsize
    # A dispatch declares the weights of as many experts as can be chosen.
    spare = min(tokens * shape.top_k, shape.experts) - used
    not_read = {stage: spare * size for stage, size in expert_bytes.items()}
    return {
        "tokens": tokens,
        **{key: ran[key] for key in ("family", "chosen_by", "row_tile", "tile_n", "engine", "dispatches")},
        "calls": rounds * INPUTS,
        "seconds": seconds,
        "bytes": moved,
        "bandwidth_fraction": moved / bandwidth / seconds,
        "kernel_seconds": profile.seconds / (rounds * INPUTS),
        "experts": used,
        "kernels": _kernels(profile, rounds * INPUTS, bandwidth, not_read),
    }


def _expert_bytes(layer: layers.Layer, weights: tuple) -> dict[str, float]:
    """Of one expert, by the stage that reads them."""
    matrix = layer.shape.hidden * layer.shape.intermediate * layer.dtype.itemsize
    if isinstance(weights[0], torch.Tensor):
        return {"gate_up": 2 * matrix, "down": matrix}
    w1, w2 = (each.bits_per_weight / 8 * each.shape[1:].numel() for each in weights)
    return {"gate_up": w1, "down": w2}


def _kernels(profile: Profile, calls: int, bandwidth: float, not_read: dict[str, float]) -> list[dict]:
    """Of one call; `not_read`: bytes that the dispatches of a stage declare, and these calls did not need."""
    stages = {kernel["name"]: kernel["stage"] for kernel in metal_moe.kernels(device_of(profile.kernels[0].engine))}
    kernels = []
    for kernel in profile.kernels:
        values = asdict(kernel)
        for name in ("bytes", "seconds", "encode_seconds"):
            values[name] /= calls
        values["bytes"] -= not_read.get(stages.get(kernel.kernel), 0.0)
        fraction = values["bytes"] / bandwidth / kernel.seconds * calls if kernel.seconds else None
        kernels.append({**values, "bandwidth_fraction": fraction})
    return kernels


def _draw(result: dict, path: Path) -> None:
    from ..profile._plot import draw

    panels = []
    for row in result["results"]:
        bars = [
            (kernel["kernel"], kernel["seconds"], kernel["bytes"] / result["memory_bandwidth"])
            for kernel in row["kernels"]
            if kernel["seconds"]
        ]
        panels.append((f"{result['layer']['name']}, {row['tokens']} tokens", bars))
    draw(panels, path)


def render(result: dict) -> str:
    layer, device = result["layer"], result["device"]
    lines = [
        f"One layer of {layer['name']}: H {layer['hidden']}, I {layer['intermediate']}, {layer['experts']} experts, "
        f"{layer['top_k']} per token, {layer['shared_experts']} shared; {layer['format']} weights, {layer['dtype']}",
        f"on {device.get('name', device['device'])}, {result['threads']} threads; "
        f"memory {result['memory_bandwidth_of']} {result['memory_bandwidth'] / 1e9:.1f} GB/s, the floor",
    ]
    for row in result["results"]:
        rows = []
        for kernel in row["kernels"]:
            fraction = kernel["bandwidth_fraction"]
            each = milliseconds(kernel["seconds"]) if kernel["seconds"] else "-"
            share = f"{kernel['seconds'] / row['kernel_seconds']:.0%}" if kernel["seconds"] else "-"
            rows.append([kernel["kernel"], each, share, f"{kernel['bytes'] / 1e6:.2f}"])
            rows[-1].append("-" if fraction is None else f"{fraction:.0%}")
        lines += [
            "",
            f"{row['tokens']} tokens: {row['family']}, by {row['chosen_by']}, row tile {row['row_tile']}, "
            f"{row['experts']:.3g} experts; {milliseconds(row['seconds'])} ms a call, {row['bytes'] / 1e6:.1f} MB, "
            f"{row['bandwidth_fraction']:.0%} of the floor",
            table(["kernel", "ms", "share", "MB", "of floor"], rows),
        ]
    return "\n".join(lines)
