"""Whether a result counts: errors within tolerance, and no other engine than the device's own."""

from metal_moe.cli.demo import TOLERANCES

from .measure import GENERIC, GENERIC_GRAPH, OURS, OURS_GRAPH

# Of a peer: it rounds more often. Beyond this it computes something else, and its time is no comparison.
PEER_TOLERANCE_FACTOR = 4


def failures(result: dict) -> list[str]:
    """A line for everything that is wrong with a result; none where all is well."""
    tolerance = TOLERANCES[result["dtype"]]
    engine = result["device"]["engine"]
    lines = []
    for row in result["results"]:
        place = f"{row['model']}, {row['tokens']} tokens"
        for name, error in row["relative_error"].items():
            ours = name in (OURS, OURS_GRAPH, GENERIC, GENERIC_GRAPH)
            limit = tolerance if ours else PEER_TOLERANCE_FACTOR * tolerance
            if error is None or not error <= limit:
                shown = "not finite" if error is None else f"{error:.1e}"
                lines.append(f"{place}: error of {name} is {shown}; the limit is {limit:g}")
        if row["engine"] != engine:
            lines.append(f"{place}: ran on engine {row['engine']}; the device's is {engine}")
    return lines
