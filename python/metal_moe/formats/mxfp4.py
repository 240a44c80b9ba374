"""Block floating point: mxfp4 as gpt-oss and MLX store it, and mxfp8 and nvfp4, which the same decoder reads.

weight = element * scale, with one scale byte per block of columns and nothing added:

| name | element | block | scale |
| --- | --- | --- | --- |
| mxfp4 | e2m1 | 32 | e8m0: 2**(byte - 127); byte 255 is NaN |
| nvfp4 | e2m1 | 16 | e4m3, not negative |
| mxfp8 | e4m3 | 32 | e8m0 |

e2m1 elements stand two to a byte, the even column in the low four bits; e4m3 elements are bytes. Scales are
[rows, columns / block]. So gpt-oss's `blocks` [E, rows, K / 32, 16] and MLX's uint32 [E, rows, K / 8] are the same
bytes.

`encode` chooses what `mx.quantize` chooses: the block's largest magnitude over the largest element as scale (e8m0: the
next power of two, so that nothing is cut off), then the nearest element; of two equally near e2m1 ones the smaller.
Blocks too small for the smallest scale get that scale (there MLX's scale byte wraps around).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import pack, unpack
from .layout import Extent, Format, Settings, Stack

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway between neighbours; a tie goes to the smaller magnitude.
E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E4M3_LARGEST = 448.0


class BlockFloat(Format):
    IN_KERNELS = True
    BITS: int
    BLOCK: int
    SCALE_TYPE: str

    def settings(self, bits: float | None, group_size: int | None, dtype: torch.dtype | None = None) -> Settings:
        return Settings(
            self.NAME,
            self.BITS if bits is None else bits,
            self.BLOCK if group_size is None else group_size,
            self.SCALE_TYPE,
        )

    def check(self, settings: Settings, rows: int, columns: int) -> None:
        for name, value, must in (
            ("bits", settings.bits, self.BITS),
            ("group_size", settings.group_size, self.BLOCK),
            ("scale_type", settings.scale_type, self.SCALE_TYPE),
        ):
            if value != must:
                raise ValueError(f"{name} is {value}; {self.NAME} has {must}")
        if columns % self.BLOCK:
            raise ValueError(f"the matrix has {columns} columns; it must be a multiple of {self.BLOCK}")

    def extents(self, settings: Settings, rows: int, columns: int) -> tuple[Extent, Extent, Extent]:
        return Extent(rows, columns * self.BITS // 8), Extent(rows, columns // self.BLOCK), Extent(0, 0)

    def encode(self, weights: Tensor, settings: Settings) -> Stack:
        n, rows, columns = weights.shape
        blocks = weights.float().reshape(n, rows, -1, self.BLOCK)
        largest = blocks.abs().amax(-1) / (E2M1[-1] if self.BITS == 4 else E4M3_LARGEST)
        if self.SCALE_TYPE == "e8m0":
            exponent = torch.log2(largest.double()).ceil().clamp(-127, 127)
            # A block of zeros has scale 1.
            scale_codes = torch.where(largest > 0, exponent + 127, 127).to(torch.uint8)
        else:
            if largest.max() > E4M3_LARGEST:
                limit = E4M3_LARGEST * E2M1[-1]
                raise ValueError(f"w has values up to {float(blocks.abs().max()):.3g}; {self.NAME} has up to {limit:g}")
            scale_codes = encode_e4m3(largest)
        scales = decode_scales(scale_codes, self.SCALE_TYPE, torch.float32)[..., None]
        elements = torch.where(scales == 0, 0.0, blocks / torch.where(scales == 0, 1.0, scales))
        codes = encode_e2m1(elements) if self.BITS == 4 else encode_e4m3(elements)
        return Stack(settings, rows, columns, pack(codes.view(n, rows, columns), self.BITS), scale_codes)

    def decode(self, stack: Stack, dtype: torch.dtype) -> Tensor:
        scales = decode_scales(stack.scales, self.SCALE_TYPE, dtype)[..., None]
        codes = unpack(stack.codes, self.BITS)
        if self.BITS == 4:
            magnitudes = torch.tensor(E2M1, dtype=dtype, device=codes.device)
            table = torch.cat([magnitudes, -magnitudes])
        else:
            table = e4m3_values(codes.device).to(dtype)
        elements = table[codes.int()].view(*stack.codes.shape[:2], -1, self.BLOCK)
        return elements.mul_(scales).view(*stack.codes.shape[:2], stack.columns)


class MXFP4(BlockFloat):
    NAME, NUMBER, BITS, BLOCK, SCALE_TYPE = "mxfp4", 2, 4, 32, "e8m0"


class MXFP8(BlockFloat):
    NAME, NUMBER, BITS, BLOCK, SCALE_TYPE = "mxfp8", 3, 8, 32, "e8m0"


class NVFP4(BlockFloat):
    NAME, NUMBER, BITS, BLOCK, SCALE_TYPE = "nvfp4", 4, 4, 16, "e4m3"


def e4m3_values(device: torch.device) -> Tensor:
    """The 256 values of e4m3 (bias 7, no infinities; codes 127 and 255 are NaN)."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def decode_scales(codes: Tensor, scale_type: str, dtype: torch.dtype) -> Tensor:
    if scale_type == "e4m3":
        return e4m3_values(codes.device).to(dtype)[codes.int()]
    # 2**-127 is subnormal in float32: it is taken from float64, where it is not.
    powers = torch.exp2(torch.arange(-127, 129, dtype=torch.float64, device=codes.device))
    powers[255] = float("nan")
    return powers.to(dtype)[codes.int()]


def encode_e2m1(values: Tensor) -> Tensor:
    """To nearest, ties to the smaller magnitude, zero without a sign; beyond the largest: the largest."""
    magnitude = values.abs()
    codes = sum((magnitude > tie).to(torch.uint8) for tie in E2M1_TIES)
    return torch.where((values < 0) & (codes > 0), codes | 8, codes)


def encode_e4m3(values: Tensor) -> Tensor:
    """To nearest, ties to even; beyond the largest: the largest."""
    return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
