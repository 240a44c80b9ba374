"""Times the operations that make a naive MoE layer slow: a matrix product, an expert loop, selection by indexing.

The sizes are Mixtral's: 128 tokens, H 4096, I 14336, 8 experts, 2 per token. Selection by indexing copies one expert's
matrix for every token, 15 GB at full size; without --scale the sizes are halved until everything fits in half of the
free memory. All inputs are initialised and every operation is warmed up, so that allocator and first-touch costs are
not counted. Last comes the layer as a loop over experts and as one `fused_moe` call, where the device is supported.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

import metal_moe

from .. import baselines, reference
from .._validate import DEFAULT_DEVICE
from ..layers import MIXTRAL_8X7B, LayerShape, make_layer
from ..timing import median_seconds
from .text import DTYPES, Progress, gigabytes, milliseconds, table

NAME = "repro"
HELP = "why naive expert selection is slow, and what the fused layer takes"

LOOP_ITERATIONS = 3
SMALLEST_SCALE = 1 / 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="any device of PyTorch (default: %(default)s)")
    parser.add_argument("--scale", type=float, help="factor on H and I (default: the largest of 1, 1/2, ... that fits)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and activations (default: bf16)")


def needed_bytes(shape: LayerShape, tokens: int, dtype: torch.dtype) -> int:
    """The layer's weights and the gathered copy."""
    return shape.weight_bytes(dtype) + tokens * shape.hidden * shape.intermediate * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory of the device that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    # Containers limit memory below what the machine has.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def fitting_scale(tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    scale, budget = 1.0, available_bytes(device) // 2
    while scale > SMALLEST_SCALE and needed_bytes(MIXTRAL_8X7B.scaled(scale), tokens, dtype) > budget:
        scale /= 2
    return scale


def run(options: argparse.Namespace, progress: Progress) -> dict:
    if options.tokens < 1:
        raise ValueError(f"--tokens is {options.tokens}; it must be at least 1")
    if options.scale is not None and options.scale <= 0:
        raise ValueError(f"--scale is {options.scale}; it must be above 0")
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    scale = fitting_scale(options.tokens, dtype, device) if options.scale is None else options.scale
    shape = MIXTRAL_8X7B.scaled(scale)
    needed, available = needed_bytes(shape, options.tokens, dtype), available_bytes(device)
    if needed > available:
        raise ValueError(
            f"--scale {scale:g} needs {gigabytes(needed)} on {device}, of which {gigabytes(available)} is free; "
            "choose a smaller one or leave it out"
        )
    progress(f"drawing {gigabytes(shape.weight_bytes(dtype))} of weights")
    layer = make_layer(shape, dtype, device)
    x = layer.hidden_states(options.tokens)
    logits = layer.router_logits(x)
    weights, ids = reference.route(logits, shape.top_k, dtype=torch.float32)
    experts = layer.w2  # [E, H, I]: [in, out] of every expert
    first = ids[:, 0].contiguous()

    steps: list[tuple[str, Callable[[], object]]] = [
        ("matmul", lambda: x @ experts[0]),
        ("expert loop", lambda: [x @ experts[expert] for expert in range(LOOP_ITERATIONS)]),
        ("selection by indexing", lambda: experts[first]),
        ("layer, loop over experts", lambda: baselines.expert_loop(x, layer.w1, layer.w2, weights, ids)),
    ]
    if device.type in metal_moe.SUPPORTED_DEVICES:
        steps.insert(3, ("selection by gather_experts", lambda: metal_moe.gather_experts(experts, first)))
        steps.append(("layer, fused_moe", lambda: metal_moe.fused_moe(x, layer.w1, layer.w2, logits, shape.top_k)))
    results = []
    with torch.inference_mode():
        for name, step in steps:
            progress(name)
            results.append({"name": name, "seconds": median_seconds(step, device, budget=2.0, warm_up=1, at_least=2)})
    return {
        "device": str(device),
        "dtype": options.dtype,
        "scale": scale,
        "tokens": options.tokens,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "loop_iterations": LOOP_ITERATIONS,
        "results": results,
    }


def render(result: dict) -> str:
    tokens, hidden, intermediate = result["tokens"], result["hidden"], result["intermediate"]
    experts = f"[{result['experts']}, {hidden}, {intermediate}]"
    layer = f"{result['experts']} experts, {result['top_k']} per token"
    what = {
        "matmul": f"[{tokens}, {hidden}] @ [{hidden}, {intermediate}]",
        "expert loop": f"{result['loop_iterations']} such products",
        "selection by indexing": f"{experts}[ids], {tokens} ids",
        "selection by gather_experts": "the same in one dispatch",
        "layer, loop over experts": layer,
        "layer, fused_moe": layer + ", with routing",
    }
    base = result["results"][0]["seconds"]
    rows = [
        [step["name"], what[step["name"]], milliseconds(step["seconds"]), f"{step['seconds'] / base:.2f}"]
        for step in result["results"]
    ]
    note = "" if result["scale"] == 1 else f" (scale {result['scale']:g})"
    text = f"{result['device']}, {result['dtype']}{note}\n\n" + table(["operation", "sizes", "ms", "matmuls"], rows)
    if not any("fused_moe" in step["name"] for step in result["results"]):
        text += f"\n\nfused_moe does not run on {result['device']}."
    return text
