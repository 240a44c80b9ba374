"""A layer's result against float64, for a few of its tokens."""

import torch
from metal_moe import reference
from torch import Tensor

from .cases import Call, Quantized

# Spread over the batch: a reference of all would take longer than the benchmark.
CHECKED_TOKENS = 4


class Expected:
    """The float64 result of some tokens of a call, computed on the call's device with the experts that they use."""

    def __init__(self, call: Call, quantized: Quantized | None = None) -> None:
        """`quantized`: what stands in place of the call's weights; expected is what its codes say."""
        x, w1, w2, weights, ids = call
        last = x.shape[0] - 1
        self.tokens = sorted({round(i * last / (CHECKED_TOKENS - 1)) for i in range(CHECKED_TOKENS)})
        ids = ids[self.tokens]
        if quantized:
            used, ids = ids.unique(return_inverse=True)
            on = "cpu" if x.device.type == "mps" else x.device  # MPS has no float64
            w1, w2 = (each.to(on).dequantize(torch.float64, used.tolist()) for each in quantized)
        self.rows = reference.experts(x[self.tokens], w1, w2, weights[self.tokens], ids)

    def error(self, out: Tensor) -> float:
        """The largest error of a checked row, relative to that row."""
        return reference.relative_error(out[self.tokens], self.rows)
