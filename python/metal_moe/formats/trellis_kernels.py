"""What kernels do for trellis weights on devices that have an engine: the quantiser's search, and whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _core
from .._operator import engine_of
from .._validate import SUPPORTED_DEVICES
from .codebooks import table_on
from .layout import CODEBOOKS, Stack, as_type
from .trellis import WEIGHTS, padded_sizes

# Tiles of one call: between calls Python can be interrupted, and no dispatch keeps a GPU for long.
TILES_PER_CALL = 4096


def has_engine(tensor: Tensor) -> bool:
    """Whether kernels take this tensor."""
    return tensor.device.type in SUPPORTED_DEVICES


def nearest_walks(values: Tensor, bits: float, codebook: str) -> Tensor:
    """`viterbi.nearest_walks` as a kernel: the same states int32 [n, 256] of values [n, 256]."""
    values = values.detach().float().contiguous()
    if values.ndim != 2 or values.shape[1] != WEIGHTS:
        raise ValueError(f"values has shape {tuple(values.shape)}; it must be [n, {WEIGHTS}]")
    engine = engine_of(values)
    table = table_on(codebook, values.device, torch.float32)
    states = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    for some, found in zip(values.split(TILES_PER_CALL), states.split(TILES_PER_CALL), strict=True):
        _core.viterbi(engine, some, table, found, round(2 * bits))
    return states


def dequantize(stack: Stack) -> Tensor:
    """`Trellis.decode` in float32 as a kernel: the same weights [n, rows, columns], bit for bit."""
    half_bits, codebook = round(2 * stack.settings.bits), CODEBOOKS.index(stack.settings.codebook)
    rows, columns = padded_sizes(stack.rows, stack.columns)
    words = _aligned(stack.codes, torch.int32)
    suh = _aligned(stack.scales, torch.float16).view(-1, columns)
    svh = _aligned(stack.biases, torch.float16).view(-1, rows)
    out = torch.empty(words.shape[0], rows, columns, dtype=torch.float32, device=words.device)
    _core.dequantize_trellis(engine_of(words), words, suh, svh, out, half_bits, codebook)
    return out[:, : stack.rows, : stack.columns]


def _aligned(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as elements at an address that a kernel can read them from; a mapped file may begin anywhere."""
    return as_type(data.clone() if data.data_ptr() % dtype.itemsize else data, dtype)
