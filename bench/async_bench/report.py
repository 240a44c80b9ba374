"""A result as text: the patterns, the handlers, the overlap, and the verdict."""

from layer_bench.report import significant
from metal_moe.cli.text import table

from .patterns import AT_END, COUNTS, HANDLER, PLAIN, SYNCHRONOUS, encoders, in_flight, one_encoder
from .verdict import THRESHOLD, gain


def microseconds(seconds: float) -> str:
    return significant(seconds * 1e6)


def render(result: dict) -> str:
    return "\n\n".join([heading(result), patterns(result), handlers(result), overlap(result), verdicts(result)])


def heading(result: dict) -> str:
    device = result["device"]
    lines = [
        f"{device['name']}, {result['dtype']}, H and I times {result['scale']:.4g}, {result['date']}, "
        f"commit {result['commit'] or 'unknown'}",
        f"{result['operations']} operations a sample, {result['rounds']} samples; medians, microseconds per operation",
    ]
    if device["engine"] in ("native", "exact"):
        lines[0] += f", {result['threads']['metal_moe']} threads"
    return "\n".join(lines)


def patterns(result: dict) -> str:
    rows = result["results"]
    names = list(rows[0]["seconds"])
    for name in (*map(in_flight, COUNTS), HANDLER, *map(encoders, COUNTS), *map(one_encoder, COUNTS)):
        if name not in names:
            names.append(name)
    headings = ["pattern"]
    for row in rows:
        headings += [f"{row['model']} T={row['tokens']}", "over plain"]
    lines = []
    for name in names:
        cells = [name]
        for row in rows:
            seconds = row["seconds"].get(name)
            if seconds is None:
                cells += ["-", "-"]
            else:
                cells += [microseconds(seconds), f"{gain(row['seconds'][PLAIN], seconds):+.1%}"]
        lines.append(cells)
    text = table(headings, lines)
    if not rows[0]["owned_stream"]:
        text += "\n\n-: PyTorch's stream has no command buffers to commit; there these do nothing: " + ", ".join(
            rows[0]["no_ops"]
        )
    return text


def handlers(result: dict) -> str:
    headings = ["completion handlers", "commit()", "commit to start", "end to handler"]
    rows = []
    for row in result["results"]:
        found = row["handlers"]
        cells = [microseconds(found[name]) for name in ("commit", "start", "callback")] if found else ["-"] * 3
        rows.append([f"{row['model']} T={row['tokens']}", *cells])
    return table(headings, rows)


def overlap(result: dict) -> str:
    headings = ["layer", "router", "experts", "both", "router's share"]
    rows = []
    for row in result["results"]:
        layer = row["layer"]
        cells = [microseconds(layer[name]["median"]) for name in ("router", "experts", "router_and_experts")]
        rows.append([f"{row['model']} T={row['tokens']}", *cells, f"{row['verdict']['router_share']:.1%}"])
    return table(headings, rows)


def verdicts(result: dict) -> str:
    lines = [f"Verdict: asynchronous dispatch is worth its complexity where it gains {THRESHOLD:.0%} or more."]
    for row in result["results"]:
        found = row["verdict"]
        questions = {
            "dispatch": f"over plain calls, at best ({found['best']})",
            "sync": f"{AT_END} over {SYNCHRONOUS}",
            "overlap": "the router beside the experts, at most",
        }
        lines.append(f"{row['model']}, {row['tokens']} tokens:")
        lines += [f"  {text}: {found[name]['gain']:+.1%}, {found[name]['verdict']}" for name, text in questions.items()]
    return "\n".join(lines)
