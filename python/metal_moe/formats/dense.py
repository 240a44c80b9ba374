"""Dense weights as a format: float32, float16 or bfloat16 rows as they are, beside quantised ones in one part.

So some experts of a layer may stay as they were, and shared experts may be dense where the routed ones are quantised.
A layer that is dense throughout needs none of this: `fused_moe` takes its tensors.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .layout import RECORD, SCALE_DTYPES, SCALE_TYPES, Extent, Format, Settings, Stack, as_bytes, as_type
from .part import table_tensor

# In a record's group_size, which dense weights have no use for: kernels read a row in runs of this many columns.
RUN = 32


class Dense(Format):
    NAME = "dense"
    NUMBER = 6
    IN_KERNELS = True

    def settings(self, bits: float | None, group_size: int | None, dtype: torch.dtype | None = None) -> Settings:
        names = {known: name for name, known in SCALE_DTYPES.items()}
        scale_type = names.get(dtype, "float32")
        own = SCALE_DTYPES[scale_type].itemsize * 8
        return Settings(self.NAME, own if bits is None else bits, RUN if group_size is None else group_size, scale_type)

    def check(self, settings: Settings, rows: int, columns: int) -> None:
        if settings.scale_type not in SCALE_DTYPES:
            raise ValueError(f"scale_type is {settings.scale_type}; dense has {', '.join(SCALE_DTYPES)}")
        bits = SCALE_DTYPES[settings.scale_type].itemsize * 8
        if settings.bits != bits:
            raise ValueError(f"bits is {settings.bits:g}; dense {settings.scale_type} has {bits}")
        if settings.group_size != RUN:
            raise ValueError(f"group_size is {settings.group_size}; dense has {RUN}")

    def extents(self, settings: Settings, rows: int, columns: int) -> tuple[Extent, Extent, Extent]:
        return Extent(rows, columns * settings.bits // 8), Extent(0, 0), Extent(0, 0)

    def encode(self, weights: Tensor, settings: Settings) -> Stack:
        codes = as_bytes(weights.to(SCALE_DTYPES[settings.scale_type]))
        return Stack(settings, *weights.shape[1:], codes, codes.new_empty(len(weights), 0, 0))

    def is_finite(self, stack: Stack) -> Tensor:
        elements = as_type(stack.codes, SCALE_DTYPES[stack.settings.scale_type])
        return torch.isfinite(elements).flatten(1).all(1)

    def decode(self, stack: Stack, dtype: torch.dtype) -> Tensor:
        return as_type(stack.codes, SCALE_DTYPES[stack.settings.scale_type]).to(dtype)


def dense_buffers(weights: Tensor, count: int, interleaved: bool) -> list[Tensor]:
    """Codes, scales, biases and table of a dense tensor [E, count * rows, columns], for each of `count` parts in it.

    Nothing is copied, and the tables are kept for the next tensor of that shape.

    Args:
        weights: contiguous.
        count: 2: gate and up; 1: one matrix per expert.
        interleaved: rows are gate 0, up 0, gate 1, ...; otherwise the gate rows, then the up rows.
    """
    codes, none = as_bytes(weights).flatten(), torch.empty(0, dtype=torch.uint8, device=weights.device)
    shape, device = tuple(weights.shape), weights.device
    tables = [_table(shape, weights.dtype, count, interleaved, part, device) for part in range(count)]
    return [tensor for table in tables for tensor in (codes, none, none, table)]


def _table(*key: object) -> Tensor:
    return _kept_table(*key)


# torch.compile runs it as it traces, and does not look into it (as QuantizedExperts.untraced).
_table._dynamo_marked_constant = True


@functools.lru_cache(maxsize=256)
def _kept_table(
    shape: tuple[int, int, int], dtype: torch.dtype, count: int, interleaved: bool, part: int, device: torch.device
) -> Tensor:
    """The records of part `part` of `count`."""
    experts, rows, columns = shape
    known = Format.registry[Dense.NAME]
    settings = known.settings(None, None, dtype)
    known.check(settings, rows, columns)
    row_bytes = columns * dtype.itemsize
    records = np.zeros(experts, RECORD)
    first = part if interleaved else part * (rows // count)
    records["codes"] = (np.arange(experts, dtype=np.uint64) * rows + first) * row_bytes
    records["codes_stride"] = row_bytes * (count if interleaved else 1)
    records["format"], records["half_bits"] = known.NUMBER, 2 * settings.bits
    records["group_size"], records["scale_type"] = RUN, SCALE_TYPES.index(settings.scale_type)
    records["rows"], records["columns"] = rows // count, columns
    with unset_fake_temporarily():  # it is kept for other calls
        return table_tensor(records, device)
