"""Tensors between MLX and PyTorch, bit for bit."""

import mlx.core as mx
import numpy as np
import torch

# The reference is its CPU code, also where there is a GPU.
mx.set_default_device(mx.cpu)

DTYPES = ("float32", "float16", "bfloat16")


def to_mlx(values: np.ndarray, dtype: str) -> mx.array:
    return mx.array(values).astype(getattr(mx, dtype))


def to_torch(values: mx.array) -> torch.Tensor:
    if values.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(values.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))


def torch_to_mlx(values: torch.Tensor) -> mx.array:
    if values.dtype == torch.bfloat16:
        return mx.array(values.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(values.numpy())


def mlx_quantize(weights: mx.array, group_size: int, bits: int, mode: str) -> list[torch.Tensor]:
    """Codes (uint32), scales and, for affine, biases."""
    return [to_torch(each) for each in mx.quantize(weights, group_size=group_size, bits=bits, mode=mode)]
