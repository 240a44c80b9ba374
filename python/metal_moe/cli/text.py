"""Plain text for the terminal: tables, quantities, a progress line."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; what begins with a digit is set to the right, other text to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in (headings, *cells)) for column in range(len(headings))]
    numeric = [
        all(row[column][:1].isdigit() or row[column] in ("-", "") for row in cells) for column in range(len(widths))
    ]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, cells)])


def milliseconds(seconds: float) -> str:
    """Three significant digits: "0.0123", "1.23", "123"."""
    value = seconds * 1e3
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


class Progress:
    """What is being done, on stderr: one line that is overwritten on a terminal, a line per step elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self._last = ""

    def __call__(self, text: str) -> None:
        if self.terminal:
            self._write(f"\r\033[K{text}")
        elif text != self._last:
            self._write(text + "\n")
        self._last = text

    def note(self, text: str) -> None:
        """A line that stays."""
        self._write(("\r\033[K" if self.terminal else "") + text + "\n")
        self._last = ""

    def _write(self, text: str) -> None:
        # Whoever does not look at it gets the result all the same.
        with suppress(OSError):
            if sys.stderr is not None:
                sys.stderr.write(text)
                sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal and self._last:
            self._write("\r\033[K")


class Bar:
    """Progress of a long task: what is being done, how far it is, how long still."""

    WIDTH = 24

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._start = time.perf_counter()
        self._total = self._done = 0
        self._shown = -1

    def begin(self, total: int) -> None:
        self._total = total

    def add(self, count: int, what: str) -> None:
        self._done += count
        share = min(1.0, self._done / max(1, self._total))
        left = (time.perf_counter() - self._start) * (1 - share) / max(share, 1e-9)
        filled = round(self.WIDTH * share)
        if filled == self._shown and not self._progress.terminal:
            return
        self._shown = filled
        bar = "#" * filled + "." * (self.WIDTH - filled)
        self._progress(f"{self._name} {what} [{bar}] {100 * share:.0f}%, {left:.0f} s left")
