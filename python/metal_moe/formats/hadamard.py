"""The Hadamard transform of blocks of 128, which trellis weights are rotated by on both sides."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
# 1 / sqrt(128): makes the transform its own inverse.
NORM = 0.08838834764831845


def hadamard(x: Tensor, dim: int = -1) -> Tensor:
    """Blockwise along `dim`, natural order: entry (i, j) is (-1)**popcount(i & j) / sqrt(128).

    Seven stages of sums and differences, then one product: results do not depend on the device or on how many blocks
    there are.
    """
    x = x.movedim(dim, -1)
    shape = x.shape
    values = x.reshape(-1, BLOCK)
    width = 1
    while width < BLOCK:
        pairs = values.view(-1, BLOCK // (2 * width), 2, width)
        values = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        width *= 2
    # The factor has the transform's type: in float32 it is the float32 nearest to it, as in the kernels.
    return (values.reshape(shape) * NORM).movedim(-1, dim)
