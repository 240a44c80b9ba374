"""Runs one MoE layer of GLM-4.7-Flash, checks it against float64 and times it beside other ways to compute it.

The layer: H 2048, I 1536, 64 experts, 4 per token, one shared expert, sigmoid routing with a bias for the choice and
scale 1.8; random weights. The bandwidth column is the bytes that the layer must move (weights of the experts in use,
hidden states in and out) over its time, and that as a fraction of the memory bandwidth measured beforehand. The exit
status is 1 if an error is above the tolerance of its dtype.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import metal_moe

from .. import baselines, reference
from ..layers import GLM_4_7_FLASH, Layer, make_layer
from ..memory_bandwidth import memory_bandwidth
from ..timing import median_seconds
from .text import DTYPES, Progress, milliseconds, table

NAME = "demo"
HELP = "one layer of GLM-4.7-Flash: checked, timed, compared"

# Of a row's norm: rounding of inputs, intermediate and output to the dtype, with room for unlucky rows.
TOLERANCES = {"bf16": 1.5e-2, "fp16": 2e-3, "fp32": 1e-5}
# Naive indexing copies weights per assignment; beyond this it would take the machine's memory, not measure it.
NAIVE_LIMIT_BYTES = 1 << 30
# Seconds of repetition per measurement: 40 of them stay within a minute.
BUDGET = 0.6

CACHED = "Above 100% of the floor: the experts in use stay in the processor's cache from one call to the next."

Peer = Callable[..., Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="a device of PyTorch (default: the best one supported here)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 32, 128], help="tokens per call")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16", "fp16"], help="dtypes to run")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on H and I (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="do not time other implementations")


def best_device() -> torch.device:
    """The fastest device of this machine that metal_moe supports."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type in metal_moe.SUPPORTED_DEVICES:
        return accelerator
    return torch.device("cpu")


def run(options: argparse.Namespace, progress: Progress) -> dict:
    if min(options.tokens) < 1:
        raise ValueError(f"--tokens is {min(options.tokens)}; it must be at least 1")
    if options.scale <= 0:
        raise ValueError(f"--scale is {options.scale}; it must be above 0")
    device = best_device() if options.device is None else torch.device(options.device)
    information = metal_moe.device_info(device)
    shape = GLM_4_7_FLASH.scaled(options.scale)
    progress("measuring memory bandwidth")
    measured, bandwidth = memory_bandwidth(device)
    first = DTYPES[options.dtype[0]]
    progress(f"drawing {shape.weight_bytes(first) / 1e9:.2g} GB of weights")
    layer = make_layer(shape, first, device, options.seed)

    # One reference serves all dtypes: the first one's values are representable in the others, but for those too small
    # for a normal fp16 number, which are 1e-6 of the result.
    inputs = {tokens: layer.hidden_states(tokens, options.seed) for tokens in options.tokens}
    expected = {}
    for tokens, hidden_states in inputs.items():
        progress(f"float64 reference, {tokens} tokens")
        expected[tokens] = _reference(layer, hidden_states)

    results = []
    for name in options.dtype:
        if layer.dtype != DTYPES[name]:
            progress(f"converting weights to {name}")
            layer = layer.to(DTYPES[name])
        for tokens, hidden_states in inputs.items():
            hidden_states = hidden_states.to(layer.dtype)
            results.append(_measure(layer, name, hidden_states, *expected[tokens], bandwidth, options.peers, progress))
    return {
        "layer": {
            "name": shape.name,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "shared_experts": shape.shared_experts,
            **shape.routing,
        },
        "device": information,
        "threads": {"metal_moe": metal_moe.get_num_threads(), "torch": torch.get_num_threads()},
        "memory_bandwidth": bandwidth,
        "memory_bandwidth_of": measured,
        "tolerances": {name: TOLERANCES[name] for name in options.dtype},
        "results": results,
        "passed": all(result["passed"] for result in results),
    }


def _reference(layer: Layer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits, expert ids and the layer's output, the latter two from float64."""
    logits = layer.router_logits(hidden_states)
    weights, ids = reference.route(logits, layer.shape.top_k, **layer.routing())
    out = reference.experts(
        hidden_states, layer.w1, layer.w2, weights, ids, shared_w1=layer.shared_w1, shared_w2=layer.shared_w2
    )
    return logits, ids, out


def _measure(
    layer: Layer,
    dtype: str,
    hidden_states: Tensor,
    logits: Tensor,
    ids: Tensor,
    expected: Tensor,
    bandwidth: float,
    peers: bool,
    progress: Progress,
) -> dict:
    tokens = hidden_states.shape[0]
    shape = layer.shape

    def fused() -> Tensor:
        return metal_moe.fused_moe(
            hidden_states,
            layer.w1,
            layer.w2,
            logits,
            shape.top_k,
            **layer.routing(),
            shared_w1=layer.shared_w1,
            shared_w2=layer.shared_w2,
        )

    progress(f"{dtype}, {tokens} tokens: fused_moe")
    error = reference.relative_error(fused(), expected)
    ran = metal_moe.last_dispatch()
    seconds = median_seconds(fused, hidden_states.device, budget=BUDGET)
    moved = shape.moved_bytes(ids, layer.dtype)
    result = {
        "tokens": tokens,
        "dtype": dtype,
        **{key: ran.get(key) for key in ("family", "kernels", "dispatches", "commits", "row_tile", "tile_n", "engine")},
        "seconds": seconds,
        "bytes": moved,
        "bytes_per_second": moved / seconds,
        "bandwidth_fraction": moved / seconds / bandwidth,
        "operations_per_second": shape.operations(tokens) / seconds,
        "relative_error": _finite(error),
        "passed": error <= TOLERANCES[dtype],
        "peers": {},
    }
    if peers:
        for name, peer in _peers(layer, ids):
            progress(f"{dtype}, {tokens} tokens: {name}")
            result["peers"][name] = _measure_peer(peer, layer, hidden_states, logits, expected)
    return result


def _peers(layer: Layer, ids: Tensor) -> list[tuple[str, Peer]]:
    peers: list[tuple[str, Peer]] = [("expert loop", baselines.expert_loop)]
    if baselines.grouped_matmul_runs(layer.w1.device, layer.dtype):
        peers.append(("grouped matmul", baselines.grouped_matmul))
    if baselines.naive_indexing_bytes(layer.w1, ids) <= NAIVE_LIMIT_BYTES:
        peers.append(("naive indexing", baselines.naive_indexing))
    return peers


def _measure_peer(peer: Peer, layer: Layer, hidden_states: Tensor, logits: Tensor, expected: Tensor) -> dict:
    def call() -> Tensor:
        weights, ids = reference.route(logits, layer.shape.top_k, **layer.routing(), dtype=torch.float32)
        return peer(hidden_states, layer.w1, layer.w2, weights, ids, layer.shared_w1, layer.shared_w2)

    error = reference.relative_error(call(), expected)
    seconds = median_seconds(call, hidden_states.device, budget=BUDGET, warm_up=1, at_least=2)
    return {"seconds": seconds, "relative_error": _finite(error)}


def _finite(error: float) -> float | None:
    """JSON has no infinity: None for a result with values that are not finite."""
    return error if math.isfinite(error) else None


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def status(result: dict) -> int:
    return 0 if result["passed"] else 1


def render(result: dict) -> str:
    layer, device = result["layer"], result["device"]
    names = list(dict.fromkeys(name for row in result["results"] for name in row["peers"]))
    headings = ["dtype", "tokens", "family", "dispatches", "commits", "ms", "GB/s", "of floor", "error", *names]
    rows = []
    for row in result["results"]:
        peers = (row["peers"].get(name) for name in names)
        rows.append(
            [
                row["dtype"],
                row["tokens"],
                row["family"],
                row["dispatches"],
                row["commits"],
                milliseconds(row["seconds"]),
                f"{row['bytes_per_second'] / 1e9:.1f}",
                f"{row['bandwidth_fraction']:.0%}",
                _error(row["relative_error"]) + ("" if row["passed"] else " FAILED"),
                *(f"{milliseconds(p['seconds'])} ({p['seconds'] / row['seconds']:.2f}x)" if p else "-" for p in peers),
            ]
        )
    cached = any(row["bandwidth_fraction"] > 1 for row in result["results"])
    tolerances = ", ".join(f"{name} {tolerance:g}" for name, tolerance in result["tolerances"].items())
    verdict = "every error is within tolerance" if result["passed"] else "FAILED: an error is above tolerance"
    return "\n".join(
        [
            f"One layer of {layer['name']}: H {layer['hidden']}, I {layer['intermediate']}, "
            f"{layer['experts']} experts, {layer['top_k']} per token, {layer['shared_experts']} shared, "
            f"{layer['scoring']} routing",
            f"on {device.get('name', device['device'])}, {result['threads']['metal_moe']} threads; "
            f"memory {result['memory_bandwidth_of']} {result['memory_bandwidth'] / 1e9:.1f} GB/s, the floor",
            "",
            table(headings, rows),
            "",
            f"Against float64: {verdict} ({tolerances} of a row's norm)."
            + (" Other implementations: ms, and their time over ours." if names else ""),
            *([CACHED] if cached else []),
        ]
    )
