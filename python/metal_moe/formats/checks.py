"""Checks of tensors given as arguments: errors name the operation, the argument, what it is and what it must be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def tensor(op: str, name: str, value: object, dtypes: tuple[torch.dtype, ...], shape: Sequence[int | None]) -> None:
    """A dense tensor of one of `dtypes` and of `shape`, None being any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is of type {type(value).__name__}; it must be a torch.Tensor")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} is {str(value.dtype).removeprefix('torch.')}; it must be {wanted}")
    if value.layout is not torch.strided:
        raise ValueError(f"{op}: {name} is a {value.layout} tensor; it must be a dense one")
    fits = value.ndim == len(shape) and all(want in (None, size) for want, size in zip(shape, value.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; it must be [{wanted}]")


@contextmanager
def within(where: str) -> Iterator[None]:
    """What is wrong with a value, as a ValueError that begins with `where`, if it does not begin so already."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None


def integer(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}; it must be an int")
