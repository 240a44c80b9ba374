"""A result as text: tables of our times beside the floor, of the peers, of kernels, and of an earlier result."""

from metal_moe.cli.text import table

from .measure import GENERIC, GENERIC_GRAPH, GROUPED, GROUPED_GRAPH, LOOP, MLX, NAIVE, OURS, OURS_GRAPH
from .result import weights_of


def significant(value: float) -> str:
    """Three significant digits, without an exponent: "0.0123", "1.23", "12.3", "4567"."""
    if value == 0:
        return "0"
    decimals = 0
    while decimals < 6 and abs(value) * 10**decimals < 99.95:
        decimals += 1
    return f"{value:.{decimals}f}"


def on_gpu(result: dict) -> bool:
    return result["device"]["engine"] not in ("native", "exact")


def has_graphs(result: dict) -> bool:
    """Whether layers were also timed in a CUDA graph."""
    return result["device"]["engine"].startswith("cuda")


def time_unit(result: dict) -> tuple[str, float]:
    """Microseconds for a GPU, milliseconds for a CPU: name, and how many of them are a second."""
    return ("us", 1e6) if on_gpu(result) else ("ms", 1e3)


def heading(result: dict) -> str:
    versions, ceilings = result["versions"], result["ceilings"]
    lines = [
        f"{result['device']['name']}, {weights_of(result)}, {result['date']}, commit {result['commit'] or 'unknown'}",
        ", ".join(f"{name} {value or 'unknown'}" for name, value in versions.items()),
        f"ceilings of this run: memory {ceilings['bandwidth_of']} {ceilings['bandwidth'] / 1e9:.1f} GB/s"
        + (" (read + written)" if ceilings["bandwidth_of"] == "copies" else "")
        + f", matmul {ceilings['matmul'] / 1e12:.3g} TFLOP/s",
    ]
    if not on_gpu(result):
        lines[0] += f", {result['threads']['metal_moe']} threads"
    return "\n".join(lines)


def times(result: dict) -> str:
    """Our times beside the floor. Rates are of the graph where there is one."""
    unit, per_second = time_unit(result)
    graphs = has_graphs(result)
    graph = ["graph " + unit, "of floor"] if graphs else []
    headings = ["model", "tokens", "experts", "MB", "GFLOP", "floor " + unit, "bound", "eager " + unit, "of floor"]
    headings += [*graph, "GB/s", "TFLOP/s", "error", "family"]
    rows = []
    for row in result["results"]:
        best = OURS_GRAPH if OURS_GRAPH in row["seconds"] else OURS
        cells = [
            row["model"],
            row["tokens"],
            f"{row['experts_hit']:.1f}",
            significant(row["bytes"] / 1e6),
            significant(row["operations"] / 1e9),
            significant(row["floor_seconds"] * per_second),
            row["floor_bound"],
        ]
        for name in (OURS, OURS_GRAPH) if graphs else (OURS,):
            cells += [significant(row["seconds"][name] * per_second), f"{row['floor_fraction'][name]:.0%}"]
        error = row["relative_error"][best]
        cells += [
            significant(row["bytes_per_second"][best] / 1e9),
            significant(row["operations_per_second"][best] / 1e12),
            "not finite" if error is None else f"{error:.1e}",
            row["family"].removeprefix("moe_").removesuffix("_fp32acc"),
        ]
        rows.append(cells)
    return table(headings, rows)


def peers(result: dict) -> str:
    """Every peer's time and its ratio to ours, which above 1 is in our favour."""
    unit, per_second = time_unit(result)
    names = [LOOP, NAIVE, GROUPED, *([GROUPED_GRAPH] if has_graphs(result) else [])]
    names += [name for name in (GENERIC, GENERIC_GRAPH) if any(name in row["seconds"] for row in result["results"])]
    names += [MLX] if any(MLX in row["ratios"] for row in result["results"]) else []
    headings = ["model", "tokens"]
    for name in names:
        headings += [f"{name.replace('_', ' ')} {unit}", "ratio"]
    rows = []
    for row in result["results"]:
        cells = [row["model"], row["tokens"]]
        for name in names:
            measured = name in row["ratios"]
            cells += [
                significant(row["seconds"][name] * per_second) if measured else "-",
                f"{row['ratios'][name]:.2f}x" if measured else "-",
            ]
        rows.append(cells)
    of_graph = "; of a graph to our graph" if has_graphs(result) else ""
    explained = (
        f"ratio: its time over ours, both eager{of_graph}. -: it does not run here, or its copies are too large."
    )
    return f"{table(headings, rows)}\n\n{explained}"


def kernels(result: dict) -> str:
    """The kernels of each layer, and below them their sum beside the time in a graph: what lies between is gaps."""
    unit, per_second = time_unit(result)
    headings = ["model", "tokens", "stage", unit, "share", "MB", "GB/s", "of copies", "TFLOP/s", "launches", "kernel"]
    rows = []
    graphs = {(row["model"], row["tokens"]): row["seconds"].get(OURS_GRAPH) for row in result["results"]}
    for place, one in enumerate(result["kernels"]):
        known = one["bytes"] is not None
        rate = one["operations_per_second"]
        rows.append(
            [
                one["model"],
                one["tokens"],
                one["stage"],
                significant(one["seconds"] * per_second),
                f"{one['share']:.0%}",
                significant(one["bytes"] / 1e6) if known else "-",
                significant(one["bytes"] / one["seconds"] / 1e9) if known else "-",
                f"{one['bandwidth_fraction']:.0%}" if known else "-",
                significant(rate / 1e12) if rate else "-",
                f"{one['launches']:.3g}",
                one["kernel"],
            ]
        )
        layer = one["model"], one["tokens"]
        after = result["kernels"][place + 1] if place + 1 < len(result["kernels"]) else None
        if after is None or layer != (after["model"], after["tokens"]):
            parts = [part for part in result["kernels"] if layer == (part["model"], part["tokens"])]
            experts = sum(part["seconds"] for part in parts if part["stage"] != "route")
            graph = graphs.get(layer)
            beside = f"without route {significant(experts * per_second)}" + (
                f", in a graph {significant(graph * per_second)}" if graph else ""
            )
            total = significant(sum(part["seconds"] for part in parts) * per_second)
            rows.append([*layer, "all", total, "100%", "-", "-", "-", "-", "", beside])
    return table(headings, rows)


def compare(result: dict, earlier: dict) -> str:
    """Times now beside those of an earlier result. ValueError where the two cannot be compared."""
    for what, now, before in (
        ("device", result["device"]["name"], earlier["device"]["name"]),
        ("dtype", result["dtype"], earlier["dtype"]),
        ("weights", weights_of(result), weights_of(earlier)),
        ("scale", result["scale"], earlier["scale"]),
    ):
        if now != before:
            raise ValueError(f"--compare: the earlier result has {what} {before}, this one {now}")
    unit, per_second = time_unit(result)
    rows_before = {(row["model"], row["tokens"]): row for row in earlier["results"]}
    headings = ["model", "tokens", "timing", "before " + unit, "now " + unit, "speedup", "of floor", "then"]
    rows = []
    for row in result["results"]:
        before = rows_before.get((row["model"], row["tokens"]))
        for name in (OURS, OURS_GRAPH):
            if before is None or name not in row["seconds"] or name not in before["seconds"]:
                continue
            then, now = before["seconds"][name], row["seconds"][name]
            rows.append(
                [
                    row["model"],
                    row["tokens"],
                    "graph" if name == OURS_GRAPH else "eager",
                    significant(then * per_second),
                    significant(now * per_second),
                    f"{then / now:.2f}x",
                    f"{row['floor_fraction'][name]:.0%}",
                    f"{before['floor_fraction'][name]:.0%}",
                ]
            )
    if not rows:
        raise ValueError("--compare: the earlier result has no model and number of tokens of this one")
    return f"beside {earlier['date']}, commit {earlier['commit'] or 'unknown'}\n\n{table(headings, rows)}"


def render(result: dict, earlier: dict | None = None) -> str:
    parts = [heading(result), times(result), peers(result)]
    if result["kernels"]:
        parts.append(kernels(result))
    if earlier is not None:
        parts.append(compare(result, earlier))
    notes = [f"{row['model']}, {row['tokens']} tokens: {note}" for row in result["results"] for note in row["notes"]]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])
