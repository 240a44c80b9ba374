"""A result as a picture: for each layer the time of an operation in every pattern, and where a handler's goes."""

from pathlib import Path

from .patterns import ASYNCHRONOUS, PLAIN
from .verdict import THRESHOLD

# Distinguishable with the common kinds of colour blindness too.
PLAIN_COLOUR, ASYNCHRONOUS_COLOUR, OTHER_COLOUR, RULE_COLOUR = "#0072b2", "#009e73", "#999999", "#d55e00"


def draw(result: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["results"]
    figure = Figure(figsize=(max(6.5 * len(rows), 9), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for panel, row in zip(panels, rows, strict=True):
        _patterns(panel, row)
    figure.suptitle(
        f"asynchronous dispatch: {result['device']['name']}, {result['dtype']}, metal_moe "
        f"{result['versions']['metal_moe']} ({result['commit'] or 'commit unknown'}), {result['date'][:10]}"
    )
    figure.savefig(path, dpi=110)


def _patterns(axes, row: dict) -> None:
    names = list(row["seconds"])
    colours = [
        PLAIN_COLOUR if name == PLAIN else ASYNCHRONOUS_COLOUR if name in ASYNCHRONOUS else OTHER_COLOUR
        for name in names
    ]
    times = [row["timings"][name] for name in names]
    medians = [one["median"] * 1e6 for one in times]
    quartiles = [
        [(one["median"] - one["low"]) * 1e6 for one in times],
        [(one["high"] - one["median"]) * 1e6 for one in times],
    ]
    axes.barh(names, medians, xerr=quartiles, color=colours, error_kw={"elinewidth": 0.8})
    axes.axvline(row["seconds"][PLAIN] * 1e6 / (1 + THRESHOLD), color=RULE_COLOUR, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"{THRESHOLD:.0%} faster than plain calls",
        (row["seconds"][PLAIN] * 1e6 / (1 + THRESHOLD), 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=RULE_COLOUR,
    )
    axes.invert_yaxis()
    axes.set_xlabel("microseconds per operation (median, quartiles)")
    share = row["verdict"]["router_share"]
    axes.set_title(f"{row['model']}, {row['tokens']} tokens; router {share:.1%} of the layer", fontsize=10, pad=16)
