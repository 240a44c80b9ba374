"""Safetensors files: read through the `safetensors` package, mapped; written so that tensors are aligned.

The package checks a file's header against its length before it gives a tensor (offsets within the file, no overlap, no
gap, shapes that fit), so nothing is read outside. Errors become ValueErrors that begin with the file's name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .whole_file import whole_file

# Of a cache line; kernels ask for 16.
ALIGNMENT = 64

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}


class SafetensorsFile:
    """An open file; tensors that it gave stay valid after it is closed."""

    def __init__(self, path: Path, file: safe_open) -> None:
        self.path = path
        self._file = file
        self.tensors = frozenset(file.keys())

    def names(self) -> list[str]:
        return list(self._file.keys())

    def get(self, name: str) -> Tensor:
        """Mapped, where it begins at a multiple of its type's size: MLX writes files whose tensors begin anywhere."""
        with _named(self.path):
            tensor = self._file.get_tensor(name)
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from None


@contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[SafetensorsFile]:
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a valid safetensors file: not a regular one")
    with _named(path):
        file = safe_open(path, framework="pt")
    with file as opened:
        yield SafetensorsFile(path, opened)


def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors in the order given, each at a multiple of 64 bytes where sizes allow, without copying CPU tensors.

    The format has no gaps, so a tensor whose size is no multiple of 64 shifts the next one: large ones go first, by the
    alignment of their sizes. The file appears under its name only when it is complete.
    """
    order = sorted(tensors, key=lambda name: -(tensors[name].nbytes & -tensors[name].nbytes))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name} is {tensor.dtype}, which safetensors files do not hold")
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].detach().contiguous().cpu()
            if tensor.numel():
                file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
