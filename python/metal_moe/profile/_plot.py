"""A profile as a picture: bars of time by kernel, and how much of each the floor takes. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

Bar = tuple[str, float, float]
"""Kernel, seconds, seconds at the floor."""

# Distinguishable with the common kinds of colour blindness too.
TAKEN, FLOOR = "#56b4e9", "#0072b2"


def check_path(what: str, path: str | os.PathLike | None) -> None:
    """ValueError where `draw` could not write `path`: found out before anything is measured."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError(f"{what}: needs matplotlib, which is not installed: {error}") from error
    if path is None:
        return
    path = Path(path)
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{what} is {path}; its ending must be one of {', '.join(sorted(formats))}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{what} is {path}; there is no folder {path.absolute().parent}")


def draw(panels: Sequence[tuple[str, Sequence[Bar]]], path: str | os.PathLike | None):
    """A panel of bars under each title, all with an axis of their own; the Figure, written to `path` if given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [max(1, len(bars)) for _, bars in panels]
    figure = Figure(figsize=(9, 0.8 * len(panels) + 0.4 * sum(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    for axis, (title, bars) in zip(axes, panels, strict=True):
        names = [name for name, _, _ in bars]
        axis.barh(names, [1e3 * seconds for _, seconds, _ in bars], color=TAKEN, label="time")
        axis.barh(names, [1e3 * floor for _, _, floor in bars], height=0.3, color=FLOOR, label="of it the floor")
        for row, (_, seconds, floor) in enumerate(bars):
            axis.annotate(f" {floor / seconds:.0%}", (1e3 * max(seconds, floor), row), va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(title, fontsize=10, loc="left")
    axes[-1].set_xlabel("milliseconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure
