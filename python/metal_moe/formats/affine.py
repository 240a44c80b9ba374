"""Affine codes, in MLX's packing: weight = scale * code + bias, with one scale and one bias per group of columns.

A row is one bit stream over its bytes, least significant bit first: code i takes the bits [i * b, (i + 1) * b). Scales
and biases are [rows, columns / group_size] in float32, float16 or bfloat16; a scale may be negative.

The codes that `encode` chooses are those of `mx.quantize`: the edge of the larger magnitude, minimum or maximum, is a
code times the scale exactly, so that one of a group's extremes has no error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import pack, unpack
from .layout import SCALE_DTYPES, Extent, Format, Settings, Stack, as_bytes, as_type

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

# The smallest scale, which keeps groups of equal weights from dividing by zero.
SMALLEST_SCALE = 1e-7


class Affine(Format):
    NAME = "affine"
    NUMBER = 1
    IN_KERNELS = True
    SETTINGS_OPTIONS = ("scale_dtype",)

    def settings(
        self,
        bits: float | None,
        group_size: int | None,
        dtype: torch.dtype | None = None,
        *,
        scale_dtype: torch.dtype | None = None,
    ) -> Settings:
        names = {known: name for name, known in SCALE_DTYPES.items()}
        if scale_dtype is not None and scale_dtype not in names:
            raise ValueError(f"scale_dtype is {scale_dtype}; it must be float32, float16 or bfloat16")
        scale_type = names.get(scale_dtype or dtype, "float32")
        return Settings("affine", 4 if bits is None else bits, 64 if group_size is None else group_size, scale_type)

    def check(self, settings: Settings, rows: int, columns: int) -> None:
        if settings.bits not in BITS:
            raise ValueError(f"bits is {settings.bits:g}; affine has {', '.join(map(str, BITS))}")
        if settings.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {settings.group_size}; affine has {', '.join(map(str, GROUP_SIZES))}")
        if settings.scale_type not in SCALE_DTYPES:
            raise ValueError(f"scale_type is {settings.scale_type}; affine has {', '.join(SCALE_DTYPES)}")
        if columns % settings.group_size:
            raise ValueError(f"the matrix has {columns} columns; it must be a multiple of {settings.group_size}")

    def extents(self, settings: Settings, rows: int, columns: int) -> tuple[Extent, Extent, Extent]:
        scales = Extent(rows, columns // settings.group_size * SCALE_DTYPES[settings.scale_type].itemsize)
        return Extent(rows, columns * settings.bits // 8), scales, scales

    def encode(self, weights: Tensor, settings: Settings) -> Stack:
        n, rows, columns = weights.shape
        groups = weights.float().reshape(n, rows, -1, settings.group_size)
        low, high = groups.amin(-1), groups.amax(-1)
        largest = float(2**settings.bits - 1)
        scale = ((high - low) / largest).clamp(min=SMALLEST_SCALE)
        from_low = low.abs() > high.abs()
        edge = torch.where(from_low, low, high)
        scale = torch.where(from_low, scale, -scale)
        code_of_edge = torch.round(edge / scale)
        exact = code_of_edge != 0
        scale = torch.where(exact, edge / torch.where(exact, code_of_edge, 1.0), scale)
        bias = torch.where(exact, edge, 0.0)
        codes = torch.round((groups - bias[..., None]) / scale[..., None]).clamp(0, largest).to(torch.uint8)
        dtype = SCALE_DTYPES[settings.scale_type]
        packed = pack(codes.view(n, rows, columns), settings.bits)
        return Stack(settings, rows, columns, packed, as_bytes(scale.to(dtype)), as_bytes(bias.to(dtype)))

    def decode(self, stack: Stack, dtype: torch.dtype) -> Tensor:
        settings = stack.settings
        scale_dtype = SCALE_DTYPES[settings.scale_type]
        codes = unpack(stack.codes, settings.bits).to(dtype).view(*stack.codes.shape[:2], -1, settings.group_size)
        scales = as_type(stack.scales, scale_dtype).to(dtype)[..., None]
        biases = as_type(stack.biases, scale_dtype).to(dtype)[..., None]
        return codes.mul_(scales).add_(biases).view(*stack.codes.shape[:2], stack.columns)
