"""How fast this machine moves memory: the floor under every layer that is bound by its weights."""

import time

import numpy as np
import torch

from .timing import median_seconds

# Far beyond any last-level cache, so that every pass reads memory.
BUFFER_BYTES = 512 << 20
# Of a GPU, and copies in a row: milliseconds, beside which the microseconds of launching and waiting vanish.
DEVICE_BUFFER_BYTES = 4 << 30
DEVICE_COPIES = 4


def memory_bandwidth(device: torch.device | str = "cpu", passes: int = 7) -> tuple[str, float]:
    """What the floor on `device` is measured with, and its bytes per second: "reads" on the CPU, "copies" elsewhere.

    A GPU's copy is the figure that everybody can measure and compare. A layer reads far more than it writes, and memory
    that never turns from reading to writing may do a little better than a copy. On a CPU a copy would be much too easy
    a floor: a store reads its cache line first, which a copy's figure does not count.
    """
    device = torch.device(device)
    return ("reads", read_bandwidth(passes)) if device.type == "cpu" else ("copies", copy_bandwidth(device, passes))


def read_bandwidth(passes: int = 7, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes per second at which PyTorch reads a large buffer of the CPU: the best of `passes` passes of two reductions.

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


def copy_bandwidth(device: torch.device, passes: int = 7, buffer_bytes: int = DEVICE_BUFFER_BYTES) -> float:
    """Bytes per second, read and written, of large copies within the device's memory: the median of `passes`."""
    if device.type == "cuda":
        # Two buffers in half of what is free.
        buffer_bytes = min(buffer_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    elif device.type == "mps":  # memory that the whole system shares, perhaps 8 GB in all
        buffer_bytes = min(buffer_bytes, torch.mps.recommended_max_memory() // 8)
    source = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(DEVICE_COPIES):
            target.copy_(source)

    seconds = median_seconds(copy, device, at_least=passes, at_most=passes)
    return DEVICE_COPIES * 2 * source.numel() * source.element_size() / seconds
