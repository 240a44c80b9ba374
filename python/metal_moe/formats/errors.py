"""How far quantised experts are from the dense ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .quantized_experts import QuantizedExperts


@dataclass(frozen=True)
class ProjectionErrors:
    """Of one projection, by expert."""

    projection: str
    bits: list[float]
    relative_mse: list[float]
    """Sum of squared errors of the weights over the sum of their squares."""
    relative_output_mse: list[float] | None
    """The same of outputs on the calibration inputs: tr(E H E^T) / tr(W H W^T)."""


def _ratio(error: Tensor, of: Tensor) -> float:
    """0 for an expert of zeros that stayed zeros."""
    return float(error / of) if of > 0 else float(error)


def projection_errors(
    projection: str, dense: Tensor, quantised: QuantizedExperts, hessian: Tensor | None = None, first: int = 0
) -> ProjectionErrors:
    """Compares dense [E, rows, columns] with the rows from `first` on of the quantised experts.

    `hessian` is [columns, columns] or [E, columns, columns], as for `QuantizedExperts.quantize`.
    """
    part = next(iter(quantised.parts.values())) if len(quantised.parts) == 1 else quantised.parts[projection]
    weights, outputs = [], []
    for expert in range(dense.shape[0]):
        exact = dense[expert].to(quantised.device, torch.float32)
        rows = slice(first, first + exact.shape[0])
        error = quantised.dequantize(experts=[expert])[0, rows] - exact
        weights.append(_ratio(error.double().square().sum(), exact.double().square().sum()))
        if hessian is not None:
            metric = (hessian if hessian.ndim == 2 else hessian[expert]).to(error.device, torch.float32)
            seen = [((values @ metric) * values).double().sum() for values in (error, exact)]
            outputs.append(_ratio(*seen))
    bits = [float(settings.bits) for settings in part.settings]
    return ProjectionErrors(projection, bits, weights, outputs if hessian is not None else None)
