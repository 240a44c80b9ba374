"""What follows from a row: gains, the overlap potential, and the rule."""

import math
from collections.abc import Mapping

from metal_moe.cli.demo import TOLERANCES

from .patterns import ASYNCHRONOUS, AT_END, PLAIN, SYNCHRONOUS

# Of the seed investigation: what justifies the complexity of explicit asynchronous dispatch.
THRESHOLD = 0.15
WORTH_IT, NOT_WORTH_IT, UNDECIDED = "worth it", "not worth it", "undecided: the samples overlap"


def gain(before: float, after: float) -> float:
    """How much faster: 0.5 where `after` takes two thirds of `before`."""
    return before / after - 1


def judge(before: Mapping, after: Mapping) -> dict:
    """The gain from one timing to another, and what the rule says of it: "worth it" needs samples that are apart, the
    lower quartile before above the upper one after."""
    found = gain(before["median"], after["median"])
    if found < THRESHOLD:
        verdict = NOT_WORTH_IT
    else:
        verdict = WORTH_IT if before["low"] > after["high"] else UNDECIDED
    return {"gain": found, "verdict": verdict}


def of(row: Mapping) -> dict:
    """The gains that the rule is about. "dispatch": of the best asynchronous pattern over plain calls; "sync": of one
    wait at the end over a wait after each operation; "overlap": of the layer without its router, if that ran beside the
    experts and cost them nothing."""
    timings, layer = row["timings"], row["layer"]
    best = min((name for name in ASYNCHRONOUS if name in timings), key=lambda name: timings[name]["median"])
    longer = max(layer["experts"], layer["router"], key=lambda one: one["median"])
    return {
        "best": best,
        "dispatch": judge(timings[PLAIN], timings[best]),
        "sync": judge(timings[SYNCHRONOUS], timings[AT_END]),
        "overlap": judge(layer["router_and_experts"], longer),
        "router_share": layer["router"]["median"] / layer["router_and_experts"]["median"],
    }


def failures(result: Mapping) -> list[str]:
    """Results that are not those of plain calls, or not within tolerance of float64."""
    found = []
    for row in result["results"]:
        where = f"{row['model']}, {row['tokens']} tokens"
        found += [f"{where}: {name} does not give the bits of plain calls" for name in row["different"]]
        error = row["relative_error"]
        tolerance = TOLERANCES[result["dtype"]]
        if error is None or not math.isfinite(error) or error > tolerance:
            found.append(f"{where}: error {error} against float64, the tolerance is {tolerance}")
    return found
