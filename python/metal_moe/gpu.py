"""What only Apple's Metal has: GPU captures for Xcode, and memory that stays resident."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import _core
from ._validate import choices, wrong_type, wrong_value
from .formats import QuantizedExperts

__all__ = ["Residency", "capture", "keep_resident"]

ENGINE = "mps"


@contextmanager
def capture(path: str | os.PathLike) -> Iterator[Path]:
    """Writes what the GPU is given inside the `with` block to a document that Xcode opens (MPS devices only).

    The process must have been started with MTL_CAPTURE_ENABLED=1. Everything on the GPU is waited for before and after.

    Args:
        path: the document, which must not exist; its name ends in ".gputrace".

    Raises:
        RuntimeError: the device has no captures (anything but Apple's Metal), they are not enabled, or one is running.
        TypeError, ValueError: a wrong path.

    Example:
        >>> with metal_moe.capture("layer.gputrace"):
        ...     metal_moe.fused_moe(x, w1, w2, router_logits, top_k=8)
    """
    if not isinstance(path, (str, os.PathLike)):
        wrong_type("capture", "path", f"of type {type(path).__name__}", "a str or os.PathLike")
    path = Path(path).absolute()
    if path.suffix != ".gputrace":
        wrong_value("capture", "path", f'"{path.name}"', 'a name that ends in ".gputrace"')
    if path.exists():
        wrong_value("capture", "path", f'"{path}", which exists', "a new document")
    if not path.parent.is_dir():
        wrong_value("capture", "path", f'"{path}"', "in a folder that exists")
    _needs_metal("capture", "GPU captures")
    torch.mps.synchronize()
    _core.start_capture(ENGINE, str(path))
    try:
        yield path
    finally:
        torch.mps.synchronize()
        _core.stop_capture()


class Residency:
    """Tensors whose memory stays resident until `release()`, the end of a `with` block, or the end of this object."""

    def __init__(self, tensors: tuple[Tensor, ...]):
        self._tensors: tuple[Tensor, ...] = tensors  # their memory must not be given to others meanwhile
        self._core = _core.keep_resident(ENGINE, list(tensors))

    @property
    def supported(self) -> bool:
        """Whether the system can be asked: macOS 15 and later."""
        return self._core.supported

    @property
    def bytes(self) -> int:
        """How much is kept; 0 once released, and on older systems."""
        return self._core.bytes

    def release(self) -> None:
        """Ends it; a second call does nothing."""
        self._core.release()
        self._tensors = ()

    def __enter__(self) -> "Residency":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def keep_resident(*tensors: Tensor | QuantizedExperts) -> Residency:
    """Keeps the memory of large weights, dense or quantised, in reach of the GPU between calls (MPS tensors; macOS 15
    and later).

    Memory that the GPU has not used for about a second may be unmapped by the system; the next layer then waits until
    it is mapped again. PyTorch's allocator shares heaps among tensors: what is kept is the whole heap of each tensor.

    Raises:
        RuntimeError: not Apple's Metal, or Metal refuses. TypeError, ValueError: not a tensor, not on an MPS device.

    Example:
        >>> weights = metal_moe.keep_resident(w1, w2)
        >>> weights.bytes, weights.supported
        (9663676416, True)
    """
    for tensor in tensors:
        if not isinstance(tensor, Tensor | QuantizedExperts):
            wrong_type(
                "keep_resident", "tensors", f"of type {type(tensor).__name__}", "torch.Tensors or QuantizedExperts"
            )
    if not tensors:
        wrong_value("keep_resident", "tensors", "empty", "at least one tensor")
    _needs_metal("keep_resident", "residency sets")
    for tensor in tensors:
        if tensor.device.type != ENGINE:
            wrong_value("keep_resident", "tensors", f"on device {tensor.device}", f"on device {ENGINE}")
    return Residency(_memory(tensors))


def _memory(tensors: Iterable[Tensor | QuantizedExperts]) -> tuple[Tensor, ...]:
    """Tensors, and those of quantised weights that hold something."""
    found: list[Tensor] = []
    for one in tensors:
        found += [one] if isinstance(one, Tensor) else [each for each in one.state_dict().values() if each.numel()]
    return tuple(found)


def _needs_metal(op: str, what: str) -> None:
    from ._validate import SUPPORTED_DEVICES

    if ENGINE not in SUPPORTED_DEVICES:
        raise RuntimeError(
            f"{op}: {what} need Apple's Metal; the devices of this build are {choices(SUPPORTED_DEVICES)}"
        )
