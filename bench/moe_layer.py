"""Layers of real models beside PyTorch's own ways to compute them: time, fraction of the floor, ratio.

    python bench/moe_layer.py [--device cuda] [--model glm qwen3 mixtral] [--tokens 1 4 16 32 128] [--json FILE]
        [--plot FILE]

The experts of a layer, given routes, without the shared ones. In every round each implementation runs once, in turn,
so that what else the machine does falls on all alike, each on another of several inputs, so that none finds its
weights in the cache because the one before it read them. Times are medians of the rounds; on CUDA devices there is
also the time in a CUDA graph. The floor is the larger of the bytes of the experts hit over the read bandwidth, and of
the operations over the rate of a large matrix product of the same dtype, both measured in the same run. A result that
is not within tolerance of float64 ends the run with status 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import metal_moe
import torch
from metal_moe import baselines, layers, reference
from metal_moe.cli.demo import TOLERANCES
from metal_moe.cli.text import DTYPES, Progress, milliseconds, table
from metal_moe.memory_bandwidth import memory_bandwidth
from metal_moe.timing import median_seconds, synchronize
from torch import Tensor

MODELS = {"glm": layers.GLM_4_7_FLASH, "qwen3": layers.QWEN3_30B_A3B, "mixtral": layers.MIXTRAL_8X7B}
# Tokens checked against float64, spread over the batch: a reference of all would take longer than the benchmark.
CHECKED_TOKENS = 4
MATMUL = 2048, 4096, 4096
# A GPU needs more of it to fill all its cores.
DEVICE_MATMUL = 8192, 8192, 8192
# Distinct inputs in turn: they choose different experts, whose weights then come from memory, not from the last call's
# cache (as far as the experts of all of them exceed it).
INPUTS = 8

Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""hidden_states, w1, w2, topk_weights, topk_ids"""


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of PyTorch's matrix product, large enough to be bound by arithmetic."""
    m, n, k = MATMUL if device.type == "cpu" else DEVICE_MATMUL
    a, b = torch.randn(m, k).to(device, dtype), torch.randn(n, k).to(device, dtype)
    return 2 * m * n * k / median_seconds(lambda: a @ b.T, device, budget=1.0, at_most=10)


def graph_seconds(run: Callable[[Call], object], calls: list[Call], replays: int = 20) -> float:
    """Time of a call in a CUDA graph of all calls: the median replay over their number."""
    for call in calls:
        run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            run(call)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times)


def measure(layer: layers.Layer, tokens: int, rounds: int, kernel: str | None, floors: tuple[float, float]) -> dict:
    shape = layer.shape
    calls: list[Call] = []
    for seed in range(INPUTS):
        x = layer.hidden_states(tokens, seed)
        weights, ids = metal_moe.fused_topk(layer.router_logits(x), shape.top_k, **layer.routing())
        calls.append((x, layer.w1, layer.w2, weights, ids))

    def ours(call: Call) -> Tensor:
        return metal_moe.fused_experts(*call, kernel=kernel)

    implementations = {"metal_moe": ours, "loop": lambda call: baselines.expert_loop(*call)}
    if baselines.grouped_matmul_runs(layer.w1.device, layer.dtype):
        implementations["grouped_mm"] = lambda call: baselines.grouped_matmul(*call)

    x, w1, w2, weights, ids = calls[0]
    checked = sorted({round(i * (tokens - 1) / max(1, CHECKED_TOKENS - 1)) for i in range(CHECKED_TOKENS)})
    expected = reference.experts(x[checked], w1, w2, weights[checked], ids[checked])
    error = reference.relative_error(ours(calls[0])[checked], expected)
    ran = metal_moe.last_dispatch()

    times: dict[str, list[float]] = {name: [] for name in implementations}
    for round_number in range(-1, rounds):
        for place, (name, run) in enumerate(implementations.items()):
            call = calls[(round_number + 3 * place) % INPUTS]
            start = time.perf_counter()
            run(call)
            synchronize(x.device)
            if round_number >= 0:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    best_peer = min(seconds[name] for name in implementations if name != "metal_moe")
    if x.is_cuda:
        seconds["graph"] = graph_seconds(ours, calls)
    moved = statistics.mean(shape.moved_bytes(ids, layer.dtype) for *_, ids in calls)
    floor = max(moved / floors[0], shape.operations(tokens) / floors[1])
    return {
        "model": shape.name,
        "tokens": tokens,
        "experts_hit": statistics.mean(ids.unique().numel() for *_, ids in calls),
        "family": ran["family"],
        "engine": ran["engine"],
        "dispatches": ran["dispatches"],
        "seconds": seconds,
        "best_peer_over_ours": best_peer / seconds["metal_moe"],
        "bytes": moved,
        "operations": shape.operations(tokens),
        "floor_seconds": floor,
        "floor_fraction": {name: floor / seconds[name] for name in ("metal_moe", "graph") if name in seconds},
        "relative_error": error,
    }


def render(result: dict) -> str:
    rows = []
    for row in result["results"]:
        seconds = row["seconds"]
        rows.append(
            [
                row["model"],
                row["tokens"],
                row["family"],
                milliseconds(seconds["metal_moe"]),
                f"{row['bytes'] / seconds['metal_moe'] / 1e9:.1f}",
                f"{row['operations'] / seconds['metal_moe'] / 1e9:.0f}",
                f"{row['floor_fraction']['metal_moe']:.0%}",
                milliseconds(seconds["loop"]),
                milliseconds(seconds["grouped_mm"]) if "grouped_mm" in seconds else "-",
                f"{row['best_peer_over_ours']:.2f}x",
                f"{row['relative_error']:.1e}",
                milliseconds(seconds["graph"]) if "graph" in seconds else "-",
                f"{row['floor_fraction']['graph']:.0%}" if "graph" in seconds else "-",
            ]
        )
    headings = [
        "model",
        "tokens",
        "family",
        "ms",
        "GB/s",
        "GFLOP/s",
        "of floor",
        "loop",
        "grouped_mm",
        "ratio",
        "error",
        "graph ms",
        "of floor",
    ]
    return (
        f"{result['device']['name']}, {result['dtype']}, {result['threads']} threads; memory reads "
        f"{result['read_bandwidth'] / 1e9:.1f} GB/s, matmul {result['matmul_rate'] / 1e9:.0f} GFLOP/s\n\n"
        f"{table(headings, rows)}\n\nratio: best of loop and grouped_mm over metal_moe."
    )


def plot(result: dict, path: Path) -> None:
    """Time over tokens, one panel per model, the floor below."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib (pip install matplotlib)") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in result["results"]))
    figure, panels = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        rows = [row for row in result["results"] if row["model"] == model]
        tokens = [row["tokens"] for row in rows]
        for name in rows[0]["seconds"]:
            panel.loglog(tokens, [row["seconds"][name] * 1e3 for row in rows], marker="o", label=name)
        panel.loglog(tokens, [row["floor_seconds"] * 1e3 for row in rows], "k--", label="floor")
        panel.set(title=model, xlabel="tokens", ylabel="ms")
        panel.set_xticks(tokens, [str(t) for t in tokens])
        panel.minorticks_off()
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["glm", "qwen3"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 32, 128])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--kernel", default=None, help="force a family (default: the one selected for the device)")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full result")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (PNG, SVG, PDF)")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    results = []
    with Progress() as progress:
        progress("measuring memory bandwidth and matmul rate")
        floors = memory_bandwidth(options.device)[1], matmul_rate(dtype, options.device)
        for model in options.model:
            progress(f"{model}: drawing weights")
            layer = layers.make_layer(replace(MODELS[model], shared_experts=0), dtype, options.device)
            for tokens in options.tokens:
                progress(f"{model}: {tokens} tokens")
                results.append(measure(layer, tokens, options.rounds, options.kernel, floors))
            del layer
    result = {
        "device": metal_moe.device_info(options.device),
        "versions": {"metal_moe": metal_moe.__version__, "torch": torch.__version__},
        "dtype": options.dtype,
        "threads": metal_moe.get_num_threads(),
        "read_bandwidth": floors[0],
        "matmul_rate": floors[1],
        "results": results,
    }
    print(render(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        plot(result, options.plot)
    failed = [row for row in results if not row["relative_error"] <= TOLERANCES[options.dtype]]
    for row in failed:
        print(f"FAILED: {row['model']}, {row['tokens']} tokens: error {row['relative_error']:.1e}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
