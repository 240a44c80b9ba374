"""The three codebooks of trellis weights: a function from a 16-bit state to a float16, given by arithmetic.

All are pseudo-random numbers of near-normal distribution: a 32-bit multiplication scatters the state's bits, which then
become either the sum of two float16 (3inst, mcg) or the sum of the product's four bytes, scaled (mul1).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

MULTIPLIERS = {"3inst": 89226354, "mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
INCREMENTS = {"3inst": 64248484, "mcg": 0, "mul1": 0}
# 3inst and mcg: of each half the sign and the low bits of the product are kept, exponents are set to near those of 1.
HALF_MASK, HALF_XOR = 0x8FFF8FFF, 0x3B603B60
# mul1: value = (1024 + bytes) * scale + offset in one float16 fma, 1024 + bytes being the float16 0x6400 | bytes.
MUL1_SCALE, MUL1_OFFSET = 887 / 131072, -10.3828125

# Standard deviation over all states: weights are brought to about this size before they are quantised.
STANDARD_DEVIATIONS = {"3inst": 1.243711, "mcg": 1.244112, "mul1": 1.000310}


@cache
def table(codebook: str) -> np.ndarray:
    """float16 [65536], by state."""
    product = np.arange(65536, dtype=np.uint32) * np.uint32(MULTIPLIERS[codebook]) + np.uint32(INCREMENTS[codebook])
    if codebook == "mul1":
        bytes_ = product.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.uint32)
        # Exact in float64; one rounding to float16, as the fma has.
        return ((1024.0 + bytes_) * MUL1_SCALE + MUL1_OFFSET).astype(np.float16)
    halves = ((product & np.uint32(HALF_MASK)) ^ np.uint32(HALF_XOR)).view(np.float16).reshape(-1, 2)
    return halves.astype(np.float64).sum(1).astype(np.float16)


@cache
def table_on(codebook: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    with unset_fake_temporarily():  # it is kept
        return torch.from_numpy(table(codebook)).to(device, dtype)
