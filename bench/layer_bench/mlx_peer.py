"""The same quantised layer by MLX's `gather_qmm`, as mlx-lm's SwitchGLU computes it: a peer on the CPU, where `mlx` is
installed (pip install "mlx[cpu]")."""

import importlib.util

import numpy as np
import torch
from metal_moe import QuantizedExperts
from torch import Tensor

from .cases import Call, Quantized
from .clock import Run


def has_mlx(quantized: Quantized) -> bool:
    """Whether MLX is installed and has the weights' format."""
    parts = (part for weights in quantized for part in weights.parts.values())
    trellis = any(settings.format == "trellis" for part in parts for settings in part.settings)
    return not trellis and importlib.util.find_spec("mlx") is not None


def _array(tensor: Tensor, dtype: str | None = None):
    """A tensor as an mx.array: a copy of its bytes, as elements of `dtype`, its own if None."""
    import mlx.core as mx

    name = dtype or str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.contiguous().view(torch.uint16)
    array = mx.array(tensor.contiguous().numpy())
    return array if str(array.dtype).endswith(name) else array.view(getattr(mx, name))


class _Projection:
    """The one part of quantised weights as `gather_qmm` takes it."""

    def __init__(self, weights: QuantizedExperts) -> None:
        part = weights.parts["weight"]
        self.settings = part.settings[0]
        experts, rows, columns = weights.shape
        words = columns * self.settings.bits // 32
        self.codes = _array(part.codes, "uint32").reshape(experts, rows, words)
        groups = (experts, rows, columns // self.settings.group_size)
        affine = self.settings.format == "affine"
        scale_type = self.settings.scale_type if affine else "uint8"
        self.scales = _array(part.scales, scale_type).reshape(groups)
        self.biases = _array(part.biases, scale_type).reshape(groups) if affine else None

    def __call__(self, x, ids):
        import mlx.core as mx

        how = {"group_size": self.settings.group_size, "bits": self.settings.bits, "mode": self.settings.format}
        return mx.gather_qmm(x, self.codes, self.scales, self.biases, rhs_indices=ids, transpose=True, **how)


def mlx_layer(quantized: Quantized) -> Run:
    """Weights are copied to MLX once, inputs and results by every call: they are small beside the weights."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    w1, w2 = (_Projection(weights) for weights in quantized)

    def run(call: Call) -> Tensor:
        x, _, _, weights, ids = call
        rows, chosen = _array(x)[:, None, None], _array(ids)
        gate, up = mx.split(w1(rows, chosen), 2, axis=-1)
        inner = gate * mx.sigmoid(gate) * up
        out = (w2(inner, chosen)[:, :, 0] * _array(weights).astype(rows.dtype)[..., None]).sum(axis=1)
        mx.eval(out)
        if out.dtype == mx.bfloat16:
            return torch.from_numpy(np.array(out.view(mx.uint16))).view(torch.bfloat16)
        return torch.from_numpy(np.array(out))

    return run
