"""How quantised experts lie in memory: what kernels read, and what every format's class speaks in.

A *part* is one projection of all experts: gate, up, down, or gate and up together as a checkpoint may store them. It
has E matrices of [rows, columns], rows being output features, in four buffers:

| buffer | type | holds |
| --- | --- | --- |
| `codes` | bytes | the codes of all matrices; dense: their elements |
| `scales` | bytes | affine: scales; mxfp4, mxfp8, nvfp4: block scales; trellis: suh; dense: nothing |
| `biases` | bytes | affine: biases; trellis: svh; the others: nothing |
| `table` | [E, 16] 32-bit words | one record per expert |

A record is 64 bytes, little-endian, which a kernel may read as this struct:

    struct ExpertMatrix {
      ulong codes, scales, biases;  // where the matrix begins in each buffer, in bytes
      uint codes_stride;            // bytes from a row of codes to the next (trellis: from a row of tiles to the next)
      uint scales_stride;           // bytes from a row of scales, and of biases, to the next (trellis: 0)
      uint format;                  // 1 affine, 2 mxfp4, 3 mxfp8, 4 nvfp4, 5 trellis, 6 dense
      uint half_bits;               // twice the bits of a weight: trellis has rates of n + 1/2
      uint group_size;              // columns that share a scale (trellis: 128, the width of a Hadamard block)
      uint codebook;                // trellis: 0 3inst, 1 mcg, 2 mul1; otherwise 0
      uint scale_type;              // 0 float32, 1 float16, 2 bfloat16, 3 e8m0, 4 e4m3; dense: of the elements
      uint rows, columns;           // of the weights; trellis stores both rounded up to multiples of 128
      uint reserved;                // 0
    };

So bits, group sizes and even formats may differ from expert to expert, gate and up may lie in one tensor in either
order (they then share buffers, and strides tell them apart), and a checkpoint's own tensors serve as buffers where they
are laid out like this already.

Alignment: `codes`, `scales` and `biases` are multiples of 16 for a matrix that stands by itself. One that begins
inside another (up after gate) begins at a row of it, so it is aligned as rows are: at multiples of 4 bytes for codes,
of one element for scales and dense weights. A buffer's own address is PyTorch's affair: 64 bytes or more wherever
PyTorch allocated it; a tensor that lies in a mapped file may begin anywhere (`QuantizedExperts.aligned` copies those).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
RECORD_WORDS = 16
RECORD = np.dtype(
    [
        ("codes", "<u8"),
        ("scales", "<u8"),
        ("biases", "<u8"),
        ("codes_stride", "<u4"),
        ("scales_stride", "<u4"),
        ("format", "<u4"),
        ("half_bits", "<u4"),
        ("group_size", "<u4"),
        ("codebook", "<u4"),
        ("scale_type", "<u4"),
        ("rows", "<u4"),
        ("columns", "<u4"),
        ("reserved", "<u4"),
    ]
)

SCALE_TYPES = ("float32", "float16", "bfloat16", "e8m0", "e4m3")
SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODEBOOKS = ("3inst", "mcg", "mul1")

# Rows and columns of one matrix: far above any model's, and low enough that no product of two overflows 64 bits.
MAX_SIZE = 1 << 24
# Of a weight, in any format.
MAX_BITS = 32


@dataclass(frozen=True)
class Settings:
    """How one matrix is quantised."""

    format: str
    bits: float
    """Of a weight; an int unless the format has rates of n + 1/2."""
    group_size: int
    scale_type: str
    codebook: str = "3inst"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, float)) or not 0 < self.bits <= MAX_BITS:
            raise ValueError(f"bits is {self.bits!r}; it must be a number above 0, at most {MAX_BITS}")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise ValueError(f"group_size is {self.group_size!r}; it must be an int")
        whole = float(self.bits).is_integer()
        object.__setattr__(self, "bits", int(self.bits) if whole else float(self.bits))

    def __str__(self) -> str:
        own = {"trellis": self.codebook, "dense": self.scale_type}
        detail = own.get(self.format, f"g{self.group_size}")
        return f"{self.format} {self.bits:g} bits {detail}"


@dataclass(frozen=True)
class Extent:
    """Rows and bytes per row of a matrix in one buffer; no rows where the format does not use the buffer."""

    rows: int
    row_bytes: int


@dataclass
class Stack:
    """n matrices of equal shape and settings as a format encodes them: uint8, [n, rows, bytes per row] in each buffer.

    Rows are contiguous bytes; the strides between rows and between matrices are free.
    """

    settings: Settings
    rows: int
    columns: int
    codes: Tensor
    scales: Tensor
    biases: Tensor | None = None


class Format(ABC):
    """A weight format. A subclass in a module of this package is found by its name; nothing else lists the formats."""

    NAME: str
    NUMBER: int
    """In a record. A format with several names (mxfp4, mxfp8, nvfp4) has a subclass for each."""

    SETTINGS_OPTIONS: tuple[str, ...] = ()
    """Further keyword arguments of `settings`."""
    ENCODE_OPTIONS: tuple[str, ...] = ()
    """Further keyword arguments of `encode`."""
    IN_KERNELS: bool = False
    """Whether kernels/formats/decoders.h lists it: kernels take it in any mix with the others that it lists."""

    registry: dict[str, Format] = {}

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        if "NUMBER" in cls.__dict__:
            if cls.NAME in Format.registry:
                raise TypeError(f"{cls.__name__}: there is a format {cls.NAME} already")
            Format.registry[cls.NAME] = cls()

    @abstractmethod
    def settings(
        self, bits: float | None, group_size: int | None, dtype: torch.dtype | None = None, **options: object
    ) -> Settings:
        """Settings from a user's arguments for weights of `dtype`, None being the format's own choice."""

    @abstractmethod
    def check(self, settings: Settings, rows: int, columns: int) -> None:
        """ValueError where a matrix of this shape cannot be stored with these settings."""

    @abstractmethod
    def extents(self, settings: Settings, rows: int, columns: int) -> tuple[Extent, Extent, Extent]:
        """What one matrix takes in `codes`, `scales` and `biases`."""

    @abstractmethod
    def encode(self, weights: Tensor, settings: Settings, **options: object) -> Stack:
        """Quantises [n, rows, columns] float32."""

    @abstractmethod
    def decode(self, stack: Stack, dtype: torch.dtype) -> Tensor:
        """The weights [n, rows, columns] in float32 or float64, computed in that type."""

    def is_finite(self, stack: Stack) -> Tensor:
        """bool [n]: whether what `encode` gave holds finite numbers; here for float scales and biases."""
        scales = [tensor for tensor in (stack.scales, stack.biases) if tensor is not None]
        dtype = SCALE_DTYPES.get(stack.settings.scale_type)
        finite = torch.ones(len(stack.codes), dtype=torch.bool, device=stack.codes.device)
        for tensor in scales if dtype else ():
            finite &= torch.isfinite(as_type(tensor, dtype)).flatten(1).all(1)
        return finite

    def take_rows(self, record: np.void, settings: Settings, start: int, count: int, step: int) -> None:
        """Changes a record to that of the rows start, start + step, ...; here for formats of independent rows."""
        record["codes"] += start * int(record["codes_stride"])
        record["scales"] += start * int(record["scales_stride"])
        record["biases"] += start * int(record["scales_stride"]) if self.extents(settings, 2, 128)[2].rows == 2 else 0
        record["codes_stride"] *= step
        record["scales_stride"] *= step
        record["rows"] = count


def numbers() -> dict[int, Format]:
    return {known.NUMBER: known for known in Format.registry.values()}


def format_named(name: object) -> Format:
    known = Format.registry.get(name) if isinstance(name, str) else None
    if known is None:
        raise ValueError(f"format is {name!r}; it must be one of {', '.join(sorted(Format.registry))}")
    return known


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, [..., bytes of the last dimension]; no copy where the last dimension is contiguous."""
    if tensor.ndim and tensor.stride(-1) != 1:  # `contiguous` leaves a dimension of one element as it is
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(torch.uint8)


def as_type(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_bytes`; copies bytes with gaps and those that begin at no multiple of the type's size."""
    data = data.contiguous()
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def matrix_bytes(settings: Settings, rows: int, columns: int) -> int:
    """Bytes of one matrix, its scales and biases."""
    extents = format_named(settings.format).extents(settings, rows, columns)
    return sum(extent.rows * extent.row_bytes for extent in extents)
