"""Codes of 1 to 8 bits in a stream of bytes, least significant bit first."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] below 2**bits, n * bits a multiple of 8 -> bytes [..., n * bits / 8]."""
    if bits == 8:
        return codes
    # The fewest codes that fill whole bytes: at most 8 codes in 7 bytes, so one int64 holds them.
    count = 8 // math.gcd(8, bits)
    size = count * bits // 8
    words = codes.reshape(*codes.shape[:-1], -1, count).to(torch.int64)
    words = (words << torch.arange(0, count * bits, bits, device=codes.device)).sum(-1)
    packed = words[..., None] >> torch.arange(0, size * 8, 8, device=codes.device)
    return (packed & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    count = 8 // math.gcd(8, bits)
    size = count * bits // 8
    data = packed.reshape(*packed.shape[:-1], -1, size)
    codes = torch.empty(*data.shape[:-1], count, dtype=torch.uint8, device=packed.device)
    for index in range(count):
        byte, shift = divmod(index * bits, 8)
        value = data[..., byte] >> shift
        if shift + bits > 8:
            value = value | data[..., byte + 1] << (8 - shift)
        codes[..., index] = value & (2**bits - 1)
    return codes.flatten(-2)
