"""Hessians from calibration inputs: which errors of weights matter."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}


def input_hessian(inputs: Tensor) -> Tensor:
    """[columns, columns] float32: the sum of x x^T over the rows x of `inputs` [T, columns]."""
    inputs = inputs.float()
    return inputs.T @ inputs


def intermediate(
    inputs: Tensor, gate: Tensor, up: Tensor, bias: tuple[Tensor, Tensor] | None, activation: str
) -> Tensor:
    """What `down` of one expert sees: act(gate x) * (up x), [T, I] float32.

    Every expert sees all calibration inputs, also those that it would not be chosen for: rarely chosen experts would
    otherwise have next to no statistics. exllamav3 calibrates so too.
    """
    inputs = inputs.float()
    gated, raised = inputs @ gate.float().T, inputs @ up.float().T
    if bias is not None:
        gated, raised = gated + bias[0].float(), raised + bias[1].float()
    if activation == "swiglu_clamp":
        gated, raised = gated.clamp(max=7.0), raised.clamp(-7.0, 7.0)
        return gated * torch.sigmoid(1.702 * gated) * (raised + 1)
    return ACTIVATIONS[activation](gated) * raised
