"""One layer at one number of tokens: the implementations that it is computed by, their times, errors and floor."""

from dataclasses import asdict

import metal_moe
import torch
from metal_moe import baselines

from .cases import Call, Case, Quantized
from .ceilings import Ceilings
from .check import Expected
from .clock import Run, Timing, time_graph, time_in_turn
from .mlx_peer import has_mlx, mlx_layer

OURS, OURS_GRAPH = "metal_moe", "metal_moe_graph"
# Of quantised weights, by the kernels that serve every format: what compiling them for this one brings.
GENERIC, GENERIC_GRAPH = "metal_moe_generic", "metal_moe_generic_graph"
LOOP, NAIVE, GROUPED, GROUPED_GRAPH = "loop", "naive_indexing", "grouped_mm", "grouped_mm_graph"
MLX = "mlx_gather_qmm"
# Naive indexing copies weights per assignment: where its largest copy is beyond this it is left out.
NAIVE_LIMIT_BYTES = {"cpu": 1 << 30, "mps": 1 << 30, "cuda": 8 << 30}
# Each peer beside that of our times which is taken the same way.
RATIOS = {LOOP: OURS, NAIVE: OURS, GROUPED: OURS, GROUPED_GRAPH: OURS_GRAPH, MLX: OURS}
RATIOS |= {GENERIC: OURS, GENERIC_GRAPH: OURS_GRAPH}


def ours(kernel: str | None, quantized: Quantized | None = None) -> Run:
    if quantized:
        return lambda call: metal_moe.fused_experts(call[0], *quantized, *call[3:], kernel=kernel)
    return lambda call: metal_moe.fused_experts(*call, kernel=kernel)


def generic(run: Run) -> Run:
    """`run` with the kernels that serve every format."""

    def run_generic(call: Call) -> torch.Tensor:
        metal_moe.set_specialization(False)
        try:
            return run(call)
        finally:
            metal_moe.set_specialization(True)

    return run_generic


def peers(call: Call) -> dict[str, Run]:
    """What else PyTorch has for this call."""
    x, w1, _, _, ids = call
    found: dict[str, Run] = {LOOP: lambda call: baselines.expert_loop(*call)}
    if baselines.naive_indexing_bytes(w1, ids) <= NAIVE_LIMIT_BYTES.get(x.device.type, 0):
        found[NAIVE] = lambda call: baselines.naive_indexing(*call)
    if baselines.grouped_matmul_runs(x.device, x.dtype):
        found[GROUPED] = lambda call: baselines.grouped_matmul(*call)
    return found


def measure(case: Case, ceilings: Ceilings, *, kernel: str | None, rounds: int, budget: float) -> dict:
    """The row of a result: see results/README.md for its entries."""
    run_ours = ours(kernel, case.quantized)
    implementations = {OURS: run_ours, **peers(case.calls[0])}
    if case.quantized:
        implementations[GENERIC] = generic(run_ours)
    if case.quantized and case.device.type == "cpu" and has_mlx(case.quantized):
        implementations[MLX] = mlx_layer(case.quantized)
    expected = Expected(case.calls[0])
    # Each against the weights that it computes with.
    our_expected = Expected(case.calls[0], case.quantized) if case.quantized else expected
    errors = {OURS: our_expected.error(run_ours(case.calls[0]))}
    ran = metal_moe.last_dispatch()
    for name, run in implementations.items():
        if name != OURS:
            errors[name] = (our_expected if name in (GENERIC, MLX) else expected).error(run(case.calls[0]))
    times = time_in_turn(implementations, case.calls, case.device, rounds, budget)
    notes: list[str] = []
    if case.device.type == "cuda":
        times[OURS_GRAPH], out = time_graph(run_ours, case.calls, budget)
        errors[OURS_GRAPH] = our_expected.error(out)
        if GENERIC in implementations:
            times[GENERIC_GRAPH], out = time_graph(implementations[GENERIC], case.calls, budget)
            errors[GENERIC_GRAPH] = our_expected.error(out)
        if GROUPED in implementations:
            try:
                times[GROUPED_GRAPH], out = time_graph(implementations[GROUPED], case.calls, budget)
                errors[GROUPED_GRAPH] = expected.error(out)
            except RuntimeError as error:  # a PyTorch whose grouped product reads on the host
                notes.append(f"{GROUPED} cannot be captured: {str(error).splitlines()[0]}")
        del out
    return {**describe(case, ceilings, times), "relative_error": errors, **selection(ran), "notes": notes}


def describe(case: Case, ceilings: Ceilings, times: dict[str, Timing]) -> dict:
    """Sizes, floor and times, and what follows from them."""
    shape = case.shape
    operations = shape.operations(case.tokens)
    moved = case.mean(case.moved_bytes)
    floor = case.mean(lambda ids: ceilings.floor_seconds(case.moved_bytes(ids), operations))
    seconds = {name: one.median for name, one in times.items()}
    mine = {name: seconds[name] for name in (OURS, OURS_GRAPH) if name in seconds}
    return {
        "model": shape.name,
        "tokens": case.tokens,
        "experts_hit": case.experts_hit(),
        "bytes": moved,
        "operations": operations,
        "floor_seconds": floor,
        "floor_bound": "memory" if moved / ceilings.bandwidth >= operations / ceilings.matmul else "arithmetic",
        "seconds": seconds,
        "timings": {name: asdict(one) for name, one in times.items()},
        "floor_fraction": {name: floor / value for name, value in mine.items()},
        "bytes_per_second": {name: moved / value for name, value in mine.items()},
        "operations_per_second": {name: operations / value for name, value in mine.items()},
        "ratios": {peer: seconds[peer] / seconds[base] for peer, base in RATIOS.items() if peer in seconds},
    }


def selection(ran: dict) -> dict:
    """Which kernels ran, of what `last_dispatch` says."""
    return {
        name: ran[name]
        for name in (
            *("engine", "family", "kernels", "dispatches", "row_tile", "tile_n", "vectorized"),
            "specialization",
        )
    }
