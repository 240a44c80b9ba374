"""How fast this machine reads memory: the floor under every layer that is bound by its weights."""

import time

import numpy as np
import torch

# Far beyond any last-level cache, so that every pass reads memory.
BUFFER_BYTES = 512 << 20


def read_bandwidth(passes: int = 7, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes per second at which PyTorch's threads read a large buffer: the best of `passes` passes of two reductions.

    The buffer is NumPy's, which asks for huge pages where the system grants them on request: the ceiling should not
    depend on how a model's weights happen to be allocated.
    """
    values = torch.from_numpy(np.ones(buffer_bytes // 4, dtype=np.float32))
    integers = values.view(torch.int32)
    best = 0.0
    # Which of the two is nearer to the memory's limit differs between processors.
    for reduce in (lambda: torch.dot(values, values), integers.max):
        reduce()
        for _ in range(passes):
            start = time.perf_counter()
            reduce()
            best = max(best, buffer_bytes / (time.perf_counter() - start))
    return best
