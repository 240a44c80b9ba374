"""How fast this machine reads memory: the floor under every layer that is bound by its weights."""

import time

import numpy as np
import torch

# Far beyond any last-level cache, so that every pass reads memory.
BUFFER_BYTES = 512 << 20
# Of a GPU: milliseconds per pass, beside which the microseconds of a launch vanish.
DEVICE_BUFFER_BYTES = 4 << 30


def read_bandwidth(passes: int = 7, buffer_bytes: int = BUFFER_BYTES, device: torch.device | str = "cpu") -> float:
    """Bytes per second at which PyTorch reads a large buffer: the best of `passes` passes of two reductions.

    On other devices than the CPU: at which it copies within the device's memory, bytes read and written.

    The CPU's buffer is NumPy's, which asks for huge pages where the system grants them on request: the ceiling should
    not depend on how a model's weights happen to be allocated.
    """
    if torch.device(device).type != "cpu":
        return _copy_bandwidth(passes, torch.device(device))
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


def _copy_bandwidth(passes: int, device: torch.device) -> float:
    buffer_bytes = DEVICE_BUFFER_BYTES
    if device.type == "mps":  # memory that the whole system shares, perhaps 8 GB in all
        buffer_bytes = min(buffer_bytes, torch.mps.recommended_max_memory() // 8)
    source = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(passes + 1):
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        torch.accelerator.synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best
