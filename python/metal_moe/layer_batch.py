"""Several layers in one command buffer."""

import atexit
import weakref

from . import _core
from ._validate import check_bool, check_int
from .command_stream import leave

__all__ = ["LayerBatch"]

MAX_LAYERS = 4096


class LayerBatch:
    """Inside `with LayerBatch(layers=8):` this thread's operations are encoded into one command buffer for every 8
    layers, and not waited for one by one.

    A layer is a call of `fused_moe` or `fused_experts`, with what was encoded before it (`fused_topk`, `group_tokens`,
    `gather_experts`). The command buffer is committed when it holds `layers` of them and at the end of the block, so
    that the device works on it while the next layers are encoded; at the end the block waits.

    Results may be passed to further operations at once, which run in order. Everything else must wait: until the end of
    the block or `synchronize()` the values of results are undefined, and tensors that operations read must not be
    written. Between layers that PyTorch has work on, call `synchronize()`.

    - Exceptions: an exception that leaves the block loses nothing: what was encoded before it is committed and waited
      for, so that every tensor that was returned holds its values. What fails then is the last of the exception's
      `__context__`.
    - A kernel that fails is reported by the end of the block or `synchronize()` (RuntimeError naming the kernels).
    - Nested: an inner block encodes on the stream of the outer one, in order with it, and its end waits for both.
      Inside `with CommandStream():` a batch commits on that stream.
    - Threads: a block concerns the thread that has entered it; each thread has a stream of its own.
    - CUDA and MPS devices: operations run on PyTorch's stream, in order with PyTorch's, and PyTorch commits: there a
      batch does nothing, `stats()["passed"]` counts the operations, and `last_dispatch()["layer_batch"]` is "passed".

    Args:
        layers: of a command buffer, from 1. More need more scratch memory at a time.
        wait: whether the end of the block waits; without, it only commits, and a block around it must wait.

    Raises:
        TypeError, ValueError: a wrong argument.

    Example:
        >>> with metal_moe.LayerBatch(layers=8):
        ...     for w1, w2, router_logits in model:
        ...         x = metal_moe.fused_moe(x, w1, w2, router_logits, top_k=8)
        >>> x  # is there
    """

    def __init__(self, layers: int = 8, *, wait: bool = True) -> None:
        check_int("LayerBatch", "layers", layers, 1, MAX_LAYERS)
        check_bool("LayerBatch", "wait", wait)
        self._layers = layers
        self._core = _core.LayerBatch(layers, wait)
        _all.add(self)

    @property
    def layers(self) -> int:
        return self._layers

    def __enter__(self) -> "LayerBatch":
        self._core.enter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        leave(self._core, error)

    def commit(self) -> None:
        """Commits what is encoded, layers complete or not; waits only where the device is far behind."""
        self._core.commit()

    def synchronize(self) -> None:
        """Commits and waits: all results so far are there.

        Raises:
            RuntimeError: a kernel failed, or another thread has entered the batch.
        """
        self._core.synchronize()

    def cancel(self) -> None:
        """Drops what is encoded and not committed: results of these operations are undefined."""
        self._core.discard()

    def stats(self) -> dict:
        """What went through it: layers and operations (encoded), commits (of command buffers), and passed (operations
        that ran on PyTorch's stream instead)."""
        return self._core.statistics


_all: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _drain_all() -> None:
    """Of blocks that the main thread never left: drops what is not committed, waits for the rest."""
    for batch in list(_all):
        if batch._core.entered:
            try:
                batch.cancel()
                batch.synchronize()
            except RuntimeError:  # of another thread, or a failure that nobody has asked for
                pass
