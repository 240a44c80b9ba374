"""Where a layer's time goes: the GPU time of each of its kernels, from PyTorch's profiler, and the bytes it must move.

A whole layer is run, routing included, once per input; times are means over the inputs. They are the GPU's own and know
nothing of the gaps between kernels, which the time of a CUDA graph has in addition.
"""

from collections.abc import Iterable

import metal_moe
import torch
from metal_moe.layers import LayerShape

from .cases import Case
from .ceilings import Ceilings

# Ids, row numbers, offsets, router logits and weights are int32 or fp32; so are partial rows between down and combine.
WORD = 4

Event = tuple[str, float]
"""Name and seconds of a kernel that ran."""


def stage_bytes(
    stage: str,
    shape: LayerShape,
    tokens: int,
    hit: float,
    item: int,
    combined: bool,
    expert_bytes: tuple[float, float] | None = None,
) -> float | None:
    """Bytes that a stage must read and write at least: what it is given and what it leaves, once each.

    `expert_bytes`: of one expert's w1 and w2; None: dense, of `item` bytes per weight.

    `combined`: `combine` follows on `down`, which then leaves a row per assignment. None for an unknown stage.
    """
    rows = tokens * shape.top_k
    matrix = shape.hidden * shape.intermediate * item
    w1, w2 = expert_bytes or (2 * matrix, matrix)
    inner = rows * shape.intermediate * item
    hidden = tokens * shape.hidden * item
    partial = rows * shape.hidden * WORD
    routes = 2 * rows * WORD
    return {
        "route": tokens * shape.experts * WORD + routes,
        "group": (3 * rows + shape.experts) * WORD,
        "gate_up": hit * w1 + hidden + inner,
        "down": hit * w2 + inner + (partial if combined else hidden + routes),
        "combine": partial + routes + hidden,
    }.get(stage)


def stage_operations(stage: str, shape: LayerShape, tokens: int) -> int:
    """Operations of the matrix products of a stage."""
    product = 2 * tokens * shape.top_k * shape.hidden * shape.intermediate
    return {"gate_up": 2 * product, "down": product}.get(stage, 0)


def summarise(events: Iterable[Event], case: Case, ceilings: Ceilings) -> list[dict]:
    """One entry per kernel, in order of first appearance; `events` are those of all of the case's calls."""
    stages = {kernel["name"]: kernel["stage"] for kernel in metal_moe.kernels(case.device)}
    launches: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for name, time in events:
        launches[name] = launches.get(name, 0) + 1
        seconds[name] = seconds.get(name, 0.0) + time
    combined = any(stages.get(name) == "combine" for name in launches)
    hit, item, calls = case.experts_hit(), case.layer.dtype.itemsize, len(case.calls)
    entries = []
    for name in launches:
        stage = stages.get(name, "other")
        each = seconds[name] / calls
        moved = stage_bytes(stage, case.shape, case.tokens, hit, item, combined, case.expert_bytes())
        entries.append(
            {
                "model": case.shape.name,
                "tokens": case.tokens,
                "kernel": name,
                "stage": stage,
                "launches": launches[name] / calls,
                "seconds": each,
                "share": seconds[name] / sum(seconds.values()),
                "bytes": moved,
                "bandwidth_fraction": None if moved is None else moved / each / ceilings.bandwidth,
                "operations_per_second": stage_operations(stage, case.shape, case.tokens) / each,
            }
        )
    return entries


def breakdown(case: Case, ceilings: Ceilings, kernel: str | None) -> list[dict]:
    """`summarise` of a run of all of the case's calls. RuntimeError where the profiler has not seen every dispatch."""

    def run_all() -> int:
        dispatches = 0
        for (x, *dense, _, _), logits in zip(case.calls, case.logits, strict=True):
            w1, w2 = case.quantized or dense
            metal_moe.fused_moe(x, w1, w2, logits, case.shape.top_k, **case.layer.routing(), kernel=kernel)
            dispatches += metal_moe.last_dispatch()["dispatches"]
        torch.cuda.synchronize()
        return dispatches

    run_all()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        dispatches = run_all()
    known = {entry["name"] for entry in metal_moe.kernels(case.device)}
    # Work on the device, without the host's calls and without ranges that somebody has named.
    events = [
        (event.name, event.time_range.elapsed_us() * 1e-6)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    seen = sum(name in known for name, _ in events)
    if seen < dispatches:
        raise RuntimeError(
            f"--kernels: PyTorch's profiler has seen {seen} of {dispatches} dispatches; it needs CUPTI, and no other "
            "profiler may be attached"
        )
    return summarise(events, case, ceilings)
