"""What the device can do at best, measured in the same run: the two ceilings that floors are made of."""

from dataclasses import dataclass

import torch
from metal_moe.memory_bandwidth import memory_bandwidth
from metal_moe.timing import median_seconds

from .memory import free_memory

# M, N, K of a matrix product that arithmetic bounds. A GPU needs more of it to fill all its cores.
MATMUL = 2048, 4096, 4096
DEVICE_MATMUL = 8192, 8192, 8192
MATMUL_PASSES = 10
# In a row, beside which launching and waiting vanish.
MATMULS = 4


@dataclass(frozen=True)
class Ceilings:
    bandwidth: float
    """Bytes per second."""
    bandwidth_of: str
    """What was measured: "reads" or "copies" (bytes read and written)."""
    matmul: float
    """Floating-point operations per second."""

    def floor_seconds(self, moved: float, operations: float) -> float:
        """The least time for so many bytes and operations: both at once, the slower of them."""
        return max(moved / self.bandwidth, operations / self.matmul)


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    bandwidth_of, bandwidth = memory_bandwidth(device)
    free_memory(device)  # the copy's gigabytes
    return Ceilings(bandwidth, bandwidth_of, matmul_rate(dtype, device))


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of PyTorch's matrix product of large matrices: the median of some passes.

    Not the best of them: that would be a clock rate that lasts for one product, not for a layer.
    """
    m, n, k = MATMUL if device.type == "cpu" else DEVICE_MATMUL
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(n, k, device=device).to(dtype)

    def multiply() -> None:
        for _ in range(MATMULS):
            a @ b.T

    seconds = median_seconds(multiply, device, at_least=MATMUL_PASSES, at_most=MATMUL_PASSES)
    return MATMULS * 2 * m * n * k / seconds
