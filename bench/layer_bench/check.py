"""A layer's result against float64, for a few of its tokens."""

from metal_moe import reference
from torch import Tensor

from .cases import Call

# Spread over the batch: a reference of all would take longer than the benchmark.
CHECKED_TOKENS = 4


class Expected:
    """The float64 result of some tokens of a call, computed on the call's device with the experts that they use."""

    def __init__(self, call: Call) -> None:
        x, w1, w2, weights, ids = call
        last = x.shape[0] - 1
        self.tokens = sorted({round(i * last / (CHECKED_TOKENS - 1)) for i in range(CHECKED_TOKENS)})
        self.rows = reference.experts(x[self.tokens], w1, w2, weights[self.tokens], ids[self.tokens])

    def error(self, out: Tensor) -> float:
        """The largest error of a checked row, relative to that row."""
        return reference.relative_error(out[self.tokens], self.rows)
