"""Inputs of the tests, and the one comparison they are judged by."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import metal_moe
import numpy as np
import reference
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Largest error of an output row over the norm of that row: a few roundings of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

# The same of layers with quantised weights. 16 bits: one spacing of the type, to which weights (matrix families), what
# stands between the products and the result are rounded. fp32: affine elements are read as 1 + code / 2^bits, and the
# sum of the ones is taken off again, which leaves the roundings of the larger sum.
ROUNDING = {torch.float32: 5e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

FAMILIES = ["moe_decode", "moe_prefill4", "moe_base", "moe_large_batch", "moe_simd"]

# (dtype, use_fp32_acc): fp16 is the one dtype with accumulation of its own width.
PRECISIONS = [("fp32", True), ("fp16", True), ("bf16", True), ("fp16", False)]

# What the tests run on (conftest.py): the device, and the engines that may compute there.
DEVICE = torch.device("cpu")
ENGINES = ["native", "exact"]
# Of command buffers, by an operation: PyTorch commits its own.
COMMITS = {"mps": 0}

# Every edge of the selection table (1 | 2..16 | 17..32 | 33..) and of the row tiles 4, 8, 16, 32.
TOKEN_EDGES = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129]

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu2", "swiglu_clamp"]


def default_family(tokens: int, engine: str | None = None, top_k: int = 2) -> str:
    """The published table; the native engine's own has nothing after prefill4, that of cuda only base, up to 16
    assignments, between decode and large_batch. Default: the device's first engine."""
    engine = engine or ENGINES[0]
    if tokens <= 1:
        return "moe_decode"
    if engine == "cuda":
        return "moe_base" if tokens * top_k <= 16 else "moe_large_batch"
    if tokens <= 16 or engine == "native":
        return "moe_prefill4"
    return "moe_base" if tokens <= 32 else "moe_large_batch"


# Up to so many assignments (token, slot), in row tiles of so many rows, `group` does not run on a GPU.
FEW_ASSIGNMENTS, FEW_ROWS = 32, 16


def dispatches(engine: str, family: str, assignments: int, row_tile: int) -> int:
    """Dispatches of `fused_experts`: gate_up and down, in grouped families combine, and group where it runs."""
    if family.startswith("moe_decode"):
        return 2
    return 3 if engine != "native" and assignments <= FEW_ASSIGNMENTS and row_tile <= FEW_ROWS else 4


@dataclass
class Layer:
    """Arguments of one `fused_experts` call."""

    hidden_states: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **overrides: Any) -> torch.Tensor:
        return metal_moe.fused_experts(
            self.hidden_states, self.w1, self.w2, self.topk_weights, self.topk_ids, **{**self.options, **overrides}
        )

    def to(self, device: torch.device) -> Layer:
        """The same layer with its tensors on `device`."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        options = {name: move(value) for name, value in self.options.items()}
        tensors = (self.hidden_states, self.w1, self.w2, self.topk_weights, self.topk_ids)
        return Layer(*map(move, tensors), options)

    def reference(self) -> np.ndarray:
        options = {k: v for k, v in self.options.items() if k not in ("use_fp32_acc", "kernel")}
        return reference.experts(self.hidden_states, self.w1, self.w2, self.topk_weights, self.topk_ids, **options)

    def __str__(self) -> str:
        (tokens, hidden), experts = self.hidden_states.shape, self.w1.shape[0]
        shape = f"T={tokens} H={hidden} I={self.w2.shape[2]} E={experts} k={self.topk_ids.shape[1]}"
        options = {k: v if not isinstance(v, torch.Tensor) else list(v.shape) for k, v in self.options.items()}
        return f"{shape} {str(self.hidden_states.dtype).removeprefix('torch.')} {options}"


def normal(*shape: int, generator: torch.Generator, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator, dtype=torch.float32) * scale).to(dtype)


def make_ids(tokens: int, experts: int, top_k: int, routing: str, generator: torch.Generator) -> torch.Tensor:
    """Expert ids [T, k] int32.

    random: k different experts of each token; few: all from the first k + 1 experts, the others stay empty; one: every
    slot of every token the same expert; dropped: random with a third of the ids outside 0..E-1; none: all outside.
    """
    if routing == "one":
        return torch.full((tokens, top_k), experts // 2, dtype=torch.int32)
    pool = min(experts, top_k + 1) if routing == "few" else experts
    if top_k <= pool:
        ids = torch.rand(tokens, pool, generator=generator).argsort(dim=1)[:, :top_k].int()
    else:
        ids = torch.randint(0, pool, (tokens, top_k), generator=generator, dtype=torch.int32)
    outside = torch.tensor([-1, experts, experts + 7, 2**31 - 1, -(2**31)], dtype=torch.int64).int()
    strays = outside[torch.randint(0, len(outside), (tokens, top_k), generator=generator)]
    if routing == "dropped":
        return torch.where(torch.rand(tokens, top_k, generator=generator) < 1 / 3, strays, ids).contiguous()
    if routing == "none":
        return strays
    assert routing in ("random", "few"), routing
    return ids.contiguous()


def make_layer(
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype = torch.float32,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    bias: bool = False,
    shared: int = 0,
    shared_intermediate: int | None = None,
    shared_weights: bool = False,
    routing: str = "random",
    seed: int = 0,
    **options: Any,
) -> Layer:
    """x ~ N(0, 1), weights ~ N(0, 1 / fan in), routing weights that sum to 1: activations of the usual size."""
    generator = torch.Generator().manual_seed(
        seed * 1000003 + tokens * 8191 + hidden * 127 + intermediate * 31 + experts
    )
    rows = 1 if activation == "relu2" else 2
    draw = {"generator": generator, "dtype": dtype}
    layer = Layer(
        hidden_states=normal(tokens, hidden, **draw),
        w1=normal(experts, rows * intermediate, hidden, scale=hidden**-0.5, **draw),
        w2=normal(experts, hidden, intermediate, scale=intermediate**-0.5, **draw),
        topk_weights=torch.rand(tokens, top_k, generator=generator).add(0.1),
        topk_ids=make_ids(tokens, experts, top_k, routing, generator),
        options={"activation": activation, "interleaved": interleaved, **options},
    )
    layer.topk_weights /= layer.topk_weights.sum(dim=1, keepdim=True)
    if activation == "swiglu_clamp":
        # Limits low enough that both clamps act on a fair part of the values.
        layer.options.setdefault("alpha", 1.702)
        layer.options.setdefault("limit", 1.25)
    if bias:
        layer.options["w1_bias"] = normal(experts, rows * intermediate, scale=0.5, **draw)
        layer.options["w2_bias"] = normal(experts, hidden, scale=0.5, **draw)
    if shared:
        width = intermediate if shared_intermediate is None else shared_intermediate
        layer.options["shared_w1"] = normal(shared, rows * width, hidden, scale=hidden**-0.5, **draw)
        layer.options["shared_w2"] = normal(shared, hidden, width, scale=width**-0.5, **draw)
        if shared_weights:
            layer.options["shared_weights"] = torch.rand(tokens, shared, generator=generator)
    if hidden == 1:
        # A row of one element has no other to make up for it where terms cancel: keep all terms positive.
        for tensor in (layer.hidden_states, layer.w1, layer.w2, *layer.options.values()):
            if isinstance(tensor, torch.Tensor):
                tensor.abs_()
    return layer


def worst_row(out: torch.Tensor, expected: np.ndarray) -> tuple[int, float]:
    """The row of largest relative error |out - expected| / |expected| (2-norms), and that error.

    A row that must be zero has error 0 or infinity. Rows whose elements lie below the smallest normal number of the
    dtype, where it has no relative precision, count as if they were that large.
    """
    got = reference.to_double(out)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    if got.shape[0] == 0:
        return -1, 0.0
    distance = np.linalg.norm(got - expected, axis=1)
    floor = torch.finfo(out.dtype).tiny * math.sqrt(expected.shape[1])
    norm = np.linalg.norm(expected, axis=1)
    norm = np.where(norm > 0, np.maximum(norm, floor), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(distance == 0, 0.0, distance / norm)
    error = np.where(np.isnan(error), np.inf, error)
    row = int(np.argmax(error))
    return row, float(error[row])


def assert_close(out: torch.Tensor, expected: np.ndarray, about: object = "", tolerance: float | None = None) -> None:
    """Every row within the dtype's rounding of the reference."""
    tolerance = TOLERANCE[out.dtype] if tolerance is None else tolerance
    row, error = worst_row(out, expected)
    if error <= tolerance:
        return
    got = reference.to_double(out)[row]
    columns = np.flatnonzero(~(np.abs(got - expected[row]) <= tolerance * np.linalg.norm(expected[row])))
    ran = metal_moe.last_dispatch()
    raise AssertionError(
        f"relative error {error:.3e} > {tolerance:.1e} in row {row} of {out.shape[0]}; "
        f"ran {ran.get('family')} (row_tile {ran.get('row_tile')}, tile_n {ran.get('tile_n')}, "
        f"engine {ran.get('engine')}); {about}\n"
        f"columns off: {columns[:8].tolist()} ({len(columns)} of {len(got)})\n"
        f"got      {got[columns[:6]]}\nexpected {expected[row][columns[:6]]}"
    )


def check(layer: Layer, tolerance: float | None = None, **overrides: Any) -> torch.Tensor:
    """Runs the layer and compares it with the reference."""
    out = layer.run(**overrides)
    assert out.dtype == layer.hidden_states.dtype
    assert_close(out, layer.reference(), f"{layer} {overrides}", tolerance)
    return out


def check_in_threads(runs: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """Results of `runs`, after four threads have called them in turn, 200 times each, and had the same, bit for bit."""
    expected = [run() for run in runs]
    wrong = []

    def work(start: int) -> None:
        for i in range(200):
            which = (start + i) % len(runs)
            if not torch.equal(runs[which](), expected[which]):
                wrong.append((start, i))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    return expected


_PRELUDE = """\
import gc, os, resource, signal, sys, threading, time
import torch, metal_moe
from cases import make_layer
"""


def python(script: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script behind _PRELUDE in a process of its own, which ends within two minutes or has failed."""
    paths = [os.path.dirname(__file__), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return subprocess.run(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )
