"""A small chart as SVG: lines over an axis of whole numbers, values on a logarithmic scale."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
# Distinguishable with any colour vision (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def log_chart(
    title: str,
    x_label: str,
    y_label: str,
    x: Sequence[int],
    series: Mapping[str, Sequence[tuple[float, float, float] | None]],
) -> str:
    """SVG text. Each series has (lowest, mean, highest) for each x: a line of means, a bar from lowest to highest.

    Values that are 0 have no logarithm and are drawn at the chart's foot. None: there is no point.
    """
    positive = [value for points in series.values() for point in points for value in point or () if value > 0]
    low = math.floor(math.log10(min(positive, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(positive, default=1.0))))
    span = max(1, max(x) - min(x))

    def across(value: float) -> float:
        return LEFT + 20 + (WIDTH - LEFT - RIGHT - 40) * (value - min(x)) / span

    def up(value: float) -> float:
        exponent = math.log10(value) if value > 0 else low
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (exponent - low) / (high - low)

    def text(at_x: float, at_y: float, anchor: str, words: object, extra: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}"{extra}>{escape(str(words))}</text>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, 22, "middle", title, ' font-size="14"'),
        text(WIDTH / 2, HEIGHT - 12, "middle", x_label),
        text(18, HEIGHT / 2, "middle", y_label, f' transform="rotate(-90 18 {HEIGHT / 2})"'),
    ]
    for exponent in range(low, high + 1):
        y = up(10.0**exponent)
        out.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>')
        out.append(text(LEFT - 6, y + 4, "end", f"{10.0**exponent:g}"))
    for value in sorted(set(x))[:: max(1, len(set(x)) // 16)]:
        out.append(text(across(value), HEIGHT - BOTTOM + 18, "middle", value))
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        # Beside one another, so that bars of equal height can be told apart.
        shift = 4 * (index - (len(series) - 1) / 2)
        places = [(across(value) + shift, point) for value, point in zip(x, points, strict=True) if point]
        line = " ".join(f"{at:.1f},{up(mean):.1f}" for at, (_, mean, _) in places)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for at, (lowest, mean, highest) in places:
            out.append(
                f'<line x1="{at:.1f}" y1="{up(lowest):.1f}" x2="{at:.1f}" y2="{up(highest):.1f}" stroke="{colour}"/>'
                f'<circle cx="{at:.1f}" cy="{up(mean):.1f}" r="3" fill="{colour}"/>'
            )
        out.append(f'<rect x="{LEFT + 10 + 110 * index}" y="{TOP - 8}" width="10" height="10" fill="{colour}"/>')
        out.append(text(LEFT + 25 + 110 * index, TOP + 1, "start", name))
    return "\n".join([*out, "</svg>"]) + "\n"
