"""A result as a picture: the roofline above, time over tokens for each model below."""

from pathlib import Path

from .measure import GROUPED, GROUPED_GRAPH, LOOP, MLX, NAIVE, OURS, OURS_GRAPH
from .report import has_graphs, time_unit
from .result import weights_of

# Distinguishable with the common kinds of colour blindness too.
MODEL_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f"]
# Name in the legend, colour, line style, marker.
LINES = {
    OURS_GRAPH: ("metal_moe, CUDA graph", "#0072b2", "-", "o"),
    OURS: ("metal_moe", "#56b4e9", "-", "o"),
    GROUPED_GRAPH: ("PyTorch grouped_mm, CUDA graph", "#d55e00", "-", "s"),
    GROUPED: ("PyTorch grouped_mm", "#e69f00", "-", "s"),
    NAIVE: ("naive indexing", "#999999", ":", "^"),
    LOOP: ("PyTorch loop", "#666666", ":", "v"),
    MLX: ("MLX gather_qmm", "#8c6d1f", "-.", "D"),
}


def require(path: Path) -> None:
    """ValueError where `draw` could not write `path`: found out before minutes of measuring."""
    try:
        from matplotlib.backends import backend_agg
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib, which is not installed: {error}") from error
    formats = backend_agg.FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"--plot is {path}; its ending must be one of {', '.join(sorted(formats))}")


def draw(result: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in result["results"]))
    figure = Figure(figsize=(max(3.6 * len(models), 13), 12), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.add_gridspec(2, 1, height_ratios=[1.7, 1])
    above = rows[0].subgridspec(1, 2, width_ratios=[2, 1])
    below = rows[1].subgridspec(1, len(models))
    _roofline(figure.add_subplot(above[0]), result, models)
    _fractions(figure.add_subplot(above[1]), result, models)
    panels = [figure.add_subplot(below[column]) for column in range(len(models))]
    for panel, model in zip(panels, models, strict=True):
        _times(panel, result, model)
    panels[0].set_ylabel(f"time of a layer ({time_unit(result)[0]})")
    named = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    figure.suptitle(
        f"{result['device']['name']}, {weights_of(result)}, metal_moe {result['versions']['metal_moe']} "
        f"({result['commit'] or 'commit unknown'}), {result['date'][:10]}"
    )
    figure.savefig(path, dpi=110)


def _of_model(result: dict, model: str) -> list[dict]:
    return sorted((row for row in result["results"] if row["model"] == model), key=lambda row: row["tokens"])


def _best_timing(result: dict) -> str:
    return OURS_GRAPH if has_graphs(result) else OURS


def _roofline(axes, result: dict, models: list[str]) -> None:
    """Achieved operations per second over operations per byte of the floor, below what memory and arithmetic allow."""
    ceilings = result["ceilings"]
    timing = _best_timing(result)
    bandwidth, matmul = ceilings["bandwidth"] / 1e12, ceilings["matmul"] / 1e12
    ridge = matmul / bandwidth
    intensities = [row["operations"] / row["bytes"] for row in result["results"]]
    left, right = min(intensities) / 1.5, max([*intensities, ridge]) * 2
    axes.plot([left, ridge, right], [bandwidth * left, matmul, matmul], color="black", linewidth=1.5)
    middle = (left * ridge) ** 0.5
    for text, place, align, offset in (
        (f"memory {ceilings['bandwidth_of']}, {ceilings['bandwidth'] / 1e9:.0f} GB/s", middle, "right", (-6, 4)),
        (f"matmul, {matmul:.3g} TFLOP/s", right, "right", (-4, 5)),
    ):
        axes.annotate(
            text, (place, min(bandwidth * place, matmul)), xytext=offset, textcoords="offset points", ha=align
        )
    for index, model in enumerate(models):
        colour = MODEL_COLOURS[index % len(MODEL_COLOURS)]
        rows = _of_model(result, model)
        points = [(row["operations"] / row["bytes"], row["operations_per_second"][timing] / 1e12) for row in rows]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5, linewidth=0.6, label=model)
        for row, point in zip(rows, points, strict=True):
            # Points of different models often coincide: each model has a line of its own for its labels.
            axes.annotate(
                str(row["tokens"]),
                point,
                xytext=(2, -14 - 11 * index),
                textcoords="offset points",
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2},
            )
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_ylim(bottom=axes.get_ylim()[0] / 3)  # room for the labels
    axes.set_xlabel("arithmetic intensity: operations per byte of the floor (FLOP/byte)")
    axes.set_ylabel("achieved TFLOP/s")
    axes.set_title(f"roofline{' (CUDA graph)' if has_graphs(result) else ''}; the numbers are tokens")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)


def _fractions(axes, result: dict, models: list[str]) -> None:
    """The fraction of the floor over tokens."""
    timing = _best_timing(result)
    for index, model in enumerate(models):
        points = [(row["tokens"], row["floor_fraction"][timing] * 100) for row in _of_model(result, model)]
        axes.plot(*zip(*points, strict=True), color=MODEL_COLOURS[index % len(MODEL_COLOURS)], marker="o", markersize=5)
    axes.axhline(100, color="black", linewidth=1.5)
    axes.set(xscale="log", ylabel="floor over time (%)")
    axes.set_ylim(bottom=0)
    axes.set_title(f"fraction of the floor{' (CUDA graph)' if has_graphs(result) else ''}")
    _token_axis(axes, sorted({row["tokens"] for row in result["results"]}))


def _times(axes, result: dict, model: str) -> None:
    """Ours, the peers and the floor over tokens."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    rows = _of_model(result, model)
    per_second = time_unit(result)[1]
    for name, (label, colour, style, marker) in LINES.items():
        found = [(row["tokens"], row["seconds"][name] * per_second) for row in rows if name in row["seconds"]]
        if found:
            axes.plot(
                *zip(*found, strict=True), color=colour, linestyle=style, marker=marker, markersize=4, label=label
            )
    tokens = [row["tokens"] for row in rows]
    floor = [row["floor_seconds"] * per_second for row in rows]
    axes.plot(tokens, floor, color="black", linestyle="--", marker="_", linewidth=1.2, label="floor")
    axes.set(xscale="log", yscale="log", title=model)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _token_axis(axes, tokens)


def _token_axis(axes, tokens: list[int]) -> None:
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_xlabel("tokens")
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)
