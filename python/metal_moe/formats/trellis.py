"""Trellis codes: EXL3, the format of exllamav3's checkpoints, at 1 to 8 bits per weight.

    W[columns, rows] = diag(suh) H What H diag(svh)        (input features first, as the format has it)

What is made of 16 x 16 tiles. A tile's 256 weights come from one ring of 256 * bits bits: weight t takes the next
`bits` bits, its state is the 16 bits of the ring that end there, and a codebook turns the state into a float16. H is
the blockwise Hadamard transform of 128, suh and svh are signed scales of each input and output feature in float16.

In memory: codes are int16 [columns / 16, rows / 16, 16 * bits] (tiles of one row of tiles are adjacent), rows and
columns rounded up to multiples of 128. A tile is 8 * bits little-endian 32-bit words, whose most significant bit comes
first in the ring. `scales` holds suh, `biases` svh. At rates of n + 1/2 even weights take n bits, odd ones n + 1.

Within a tile, weight t stands at lane = t / 8, i = t % 8: column (input) 2 * (lane % 4) + i % 2 + 8 * (i / 2 % 2), row
(output) lane / 4 + 8 * (i / 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from . import checks
from .codebooks import table_on
from .hadamard import BLOCK, hadamard
from .layout import CODEBOOKS, Extent, Format, Settings, Stack, as_bytes, as_type, round_up

TILE = 16
WEIGHTS = TILE * TILE
STATE_BITS = 16

# The value of a marker tensor; files of 2025 with experimental multipliers exist and are refused.
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}


class Trellis(Format):
    NAME = "trellis"
    NUMBER = 5
    SETTINGS_OPTIONS = ("codebook",)
    ENCODE_OPTIONS = ("hessian", "seed", "walks")

    def settings(
        self, bits: float | None, group_size: int | None, dtype: torch.dtype | None = None, *, codebook: str = "mul1"
    ) -> Settings:
        if codebook not in CODEBOOKS:
            raise ValueError(f"codebook is {codebook!r}; it must be one of {', '.join(CODEBOOKS)}")
        return Settings(
            "trellis", 4 if bits is None else bits, BLOCK if group_size is None else group_size, "float16", codebook
        )

    def check(self, settings: Settings, rows: int, columns: int) -> None:
        bits = settings.bits
        if not 1 <= bits <= 8 or not float(2 * bits).is_integer():
            raise ValueError(f"bits is {bits:g}; trellis has 1 to 8, and n + 1/2 up to 7.5")
        if bits != int(bits) and settings.codebook != "mul1":
            raise ValueError(
                f"bits is {bits:g} with codebook {settings.codebook}; rates of n + 1/2 exist with mul1 alone"
            )
        if settings.group_size != BLOCK:
            raise ValueError(f"group_size is {settings.group_size}; trellis has {BLOCK}")
        if settings.scale_type != "float16":
            raise ValueError(f"scale_type is {settings.scale_type}; trellis has float16")

    def extents(self, settings: Settings, rows: int, columns: int) -> tuple[Extent, Extent, Extent]:
        rows, columns = padded_sizes(rows, columns)
        codes = Extent(columns // TILE, rows // TILE * tile_bytes(settings.bits))
        return codes, Extent(1, 2 * columns), Extent(1, 2 * rows)

    def take_rows(self, record: np.void, settings: Settings, start: int, count: int, step: int) -> None:
        if step != 1 or start % BLOCK or count % BLOCK:
            raise ValueError(
                f"rows {start} to {start + count}, step {step}, of trellis weights: only whole blocks of {BLOCK} "
                "consecutive rows can be taken apart; quantise gate and up as two"
            )
        record["codes"] += start // TILE * tile_bytes(settings.bits)
        record["biases"] += 2 * start
        record["rows"] = count

    def encode(self, weights: Tensor, settings: Settings, **options: object) -> Stack:
        from .trellis_quantizer import quantize

        words, suh, svh = quantize(weights.transpose(1, 2), settings.bits, settings.codebook, **options)
        return _stack(settings, weights.shape[1], weights.shape[2], words, suh, svh)

    def decode(self, stack: Stack, dtype: torch.dtype) -> Tensor:
        from . import trellis_kernels

        if dtype == torch.float32 and trellis_kernels.has_engine(stack.codes):
            return trellis_kernels.dequantize(stack)
        return decode(stack, dtype)


def decode(stack: Stack, dtype: torch.dtype) -> Tensor:
    """The weights [n, rows, columns], by PyTorch alone: in any type, on any device."""
    settings = stack.settings
    n, tile_columns = stack.codes.shape[:2]
    words = as_type(stack.codes, torch.int32).view(n, tile_columns, -1, tile_bytes(settings.bits) // 4)
    suh = as_type(stack.scales, torch.float16).view(n, 1, -1).to(dtype)
    svh = as_type(stack.biases, torch.float16).view(n, -1, 1).to(dtype)
    # [n, rows, columns]: the transform of inputs first, as the order of roundings has it.
    weights = hadamard(decode_tiles(words, settings.bits, settings.codebook, dtype)) * suh
    weights = hadamard(weights, 1) * svh
    return weights[:, : stack.rows, : stack.columns]


def padded_sizes(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns as they are stored."""
    return round_up(rows, BLOCK), round_up(columns, BLOCK)


def tile_bytes(bits: float) -> int:
    return round(2 * TILE * bits)


def step_bits(bits: float) -> np.ndarray:
    """New bits that each of the 256 weights of a tile takes from the ring."""
    whole = int(bits)
    return np.full(WEIGHTS, whole) + (0 if whole == bits else np.arange(WEIGHTS) & 1)


@cache
def tile_order() -> tuple[np.ndarray, np.ndarray]:
    """Column (input) and row (output) of each weight of a tile, in the ring's order."""
    t = np.arange(WEIGHTS)
    lane, i = t >> 3, t & 7
    return 2 * (lane & 3) + (i & 1) + 8 * (i >> 1 & 1), (lane >> 2) + 8 * (i >> 2)


def tile_states(words: Tensor, bits: float) -> Tensor:
    """int32 [..., 8 * bits] words of tiles -> int32 [..., 256] states."""
    count = words.shape[-1]
    first = (np.cumsum(step_bits(bits)) - STATE_BITS) % (32 * count)
    word, shift = np.divmod(first, 32)
    device = words.device
    high = words[..., torch.from_numpy(word).to(device)].long() & 0xFFFFFFFF
    low = words[..., torch.from_numpy((word + 1) % count).to(device)].long() & 0xFFFFFFFF
    # 64 bits of the ring from a word's beginning; the window's last bit is bit 48 - shift from the right.
    ring = (high << 16) | (low >> 16)
    return (ring >> torch.from_numpy(32 - shift).to(device) & 0xFFFF).int()


def decode_tiles(words: Tensor, bits: float, codebook: str, dtype: torch.dtype) -> Tensor:
    """int32 words [n, columns / 16, rows / 16, 8 * bits] -> rotated weights [n, rows, columns]."""
    n, tile_columns, tile_rows, _ = words.shape
    column, row = tile_order()
    place = np.empty(WEIGHTS, np.int64)
    place[row * TILE + column] = np.arange(WEIGHTS)
    states = tile_states(words, bits)[..., torch.from_numpy(place).to(words.device)]
    values = table_on(codebook, words.device, dtype)[states]
    values = values.view(n, tile_columns, tile_rows, TILE, TILE)
    return values.permute(0, 2, 3, 1, 4).reshape(n, tile_rows * TILE, tile_columns * TILE)


def pack_states(states: Tensor, bits: float) -> Tensor:
    """The inverse of `tile_states` for closed walks: int32 [..., 256] -> int32 words [..., 8 * bits]."""
    steps = step_bits(bits)
    owner = np.repeat(np.arange(WEIGHTS), steps)
    shift = np.cumsum(steps)[owner] - 1 - np.arange(steps.sum())
    device = states.device
    ring = states[..., torch.from_numpy(owner).to(device)] >> torch.from_numpy(shift).to(device) & 1
    ring = ring.view(*states.shape[:-1], -1, 32).long()
    words = (ring << torch.arange(31, -1, -1, device=device)).sum(-1)
    return words.to(torch.uint32).view(torch.int32)


def unpack_signs(words: Tensor) -> Tensor:
    """Signs as older files have them: bit i of the int16 word j is set where channel 16 * j + i is negative."""
    bits = words[:, None].int() >> torch.arange(16, device=words.device) & 1
    return (1 - 2 * bits).reshape(-1).to(torch.float16)


def _stack(settings: Settings, rows: int, columns: int, words: Tensor, suh: Tensor, svh: Tensor) -> Stack:
    """Of words [n, columns / 16, rows / 16, 8 * bits], suh [n, columns] and svh [n, rows], padded."""
    n = words.shape[0]
    codes = words.contiguous().view(torch.uint8).view(n, words.shape[1], -1)
    return Stack(settings, rows, columns, codes, as_bytes(suh)[:, None], as_bytes(svh)[:, None])


# ------------------------------------------------------------------------------------------------------ published files


def linear_settings(what: str, tensors: Mapping[str, Tensor]) -> Settings:
    """Bits and codebook of one EXL3 linear layer; ValueError where its tensors do not make one."""
    trellis = tensors.get("trellis")
    if trellis is None:
        raise ValueError(f"{what}.trellis is missing")
    checks.tensor(what, "trellis", trellis, (torch.int16,), (None, None, None))
    if "scale" in tensors:
        raise ValueError(f"{what}.scale is there: a file of the format's trial time, which is not supported")
    markers = [name for name in MARKERS if name in tensors]
    if len(markers) == 2:
        raise ValueError(f"{what} has both mcg and mul1; it must have one or neither")
    for name in markers:
        marker = tensors[name]
        if marker.numel() != 1 or marker.dtype != torch.int32:
            raise ValueError(f"{what}.{name} is {marker.dtype} {tuple(marker.shape)}; it must be one int32")
        if int(marker) & 0xFFFFFFFF != MARKERS[name]:
            raise ValueError(f"{what}.{name} is {int(marker) & 0xFFFFFFFF:#x}; it must be {MARKERS[name]:#x}")
    settings = Settings("trellis", trellis.shape[2] / TILE, BLOCK, "float16", markers[0] if markers else "3inst")
    for name, size in (("first", trellis.shape[0]), ("second", trellis.shape[1])):
        if size == 0 or size % (BLOCK // TILE):
            raise ValueError(
                f"{what}.trellis has shape {tuple(trellis.shape)}; the {name} size must be a multiple of 8"
            )
    with checks.within(f"{what}.trellis has shape {tuple(trellis.shape)}"):
        Trellis().check(settings, 1, 1)
    return settings


def _scale(what: str, tensors: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """suh or svh, or the signs that older files have in their place."""
    if f"{name}h" in tensors:
        checks.tensor(what, f"{name}h", tensors[f"{name}h"], (torch.float16,), (size,))
        return tensors[f"{name}h"]
    if name in tensors:
        checks.tensor(what, name, tensors[name], (torch.int16,), (size // 16,))
        return unpack_signs(tensors[name])
    raise ValueError(f"{what}.{name}h is missing")


def stack_exl3(
    op: str, experts: Sequence[Mapping[str, Tensor]], shape: tuple[int, int] | None, names: Sequence[str] | None = None
) -> tuple[list[tuple[list[int], Stack]], Tensor | None]:
    """Stacks of the experts of one projection, one for each bits and codebook among them, and their bias."""
    names = names or [f"{op}: experts[{index}]" for index in range(len(experts))]
    groups: dict[Settings, list[int]] = {}
    for index, (what, tensors) in enumerate(zip(names, experts, strict=True)):
        groups.setdefault(linear_settings(what, tensors), []).append(index)
    tiles = experts[0]["trellis"].shape[:2]
    stored = (tiles[1] * TILE, tiles[0] * TILE)
    rows, columns = shape or stored
    if (round_up(rows, BLOCK), round_up(columns, BLOCK)) != stored:
        raise ValueError(f"{op}: shape is {(rows, columns)}; rounded up to multiples of {BLOCK} it must be {stored}")
    stacks, biases = [], {}
    for settings, members in groups.items():
        for index in members:
            found = experts[index]["trellis"].shape[:2]
            if found != tiles:
                raise ValueError(f"{names[index]}.trellis has {tuple(found)} tiles, that of expert 0 {tuple(tiles)}")
            if "bias" in experts[index]:
                biases[index] = _bias(names[index], experts[index]["bias"], stored[0])[:rows]
        words = torch.stack([experts[index]["trellis"] for index in members]).view(torch.int32)
        suh = torch.stack([_scale(names[index], experts[index], "su", stored[1]) for index in members])
        svh = torch.stack([_scale(names[index], experts[index], "sv", stored[0]) for index in members])
        stacks.append((members, _stack(settings, rows, columns, words, suh, svh)))
    if biases and len(biases) != len(experts):
        missing = next(index for index in range(len(experts)) if index not in biases)
        raise ValueError(f"{names[missing]}.bias is missing; all experts must have one or none")
    return stacks, torch.stack([biases[index] for index in range(len(experts))]) if biases else None


def _bias(what: str, bias: Tensor, size: int) -> Tensor:
    """A bias of the width that is stored, in float16, as exllamav3 takes it."""
    checks.tensor(what, "bias", bias, (torch.float16, torch.bfloat16, torch.float32), (None,))
    if bias.shape[0] > size:
        raise ValueError(f"{what}.bias has {bias.shape[0]} entries; it must have at most {size}")
    half = bias.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(f"{what}.bias has values that are not finite in float16, as exllamav3 takes it")
    return torch.nn.functional.pad(half, (0, size - half.shape[0]))
