"""Dense experts as checkpoints hold them, one by one or stacked, and as `fused_moe` takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import checks
from .layout import SCALE_DTYPES

# Models whose fused rows are gate 0, up 0, gate 1, up 1, ...; of all others they are the gate rows, then the up rows.
INTERLEAVED_MODELS = ("gpt_oss",)


def one_by_one(name: str, gate: list[Tensor], up: list[Tensor], down: list[Tensor]) -> dict[str, Tensor]:
    """Stacks experts [I, H], [I, H] and [H, I]. `name`: for messages."""
    for projection, tensors in (("gate", gate), ("up", up), ("down", down)):
        for expert, tensor in enumerate(tensors):
            where = f"{name}.{expert}.{projection}"
            checks.tensor(where, "weight", tensor, tuple(SCALE_DTYPES.values()), (None, None))
            checks.tensor(where, "weight", tensor, (gate[0].dtype,), tensors[0].shape)
    _check_fit(name, gate[0].shape, up[0].shape, down[0].shape)
    return {"w1": torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)]), "w2": torch.stack(down)}


def stacked(name: str, gate: Tensor, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """From tensors of all experts, [E, I, H], [E, I, H] and [E, H, I]."""
    for projection, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        checks.tensor(f"{name}.{projection}", "weight", tensor, tuple(SCALE_DTYPES.values()), (None, None, None))
        checks.tensor(f"{name}.{projection}", "weight", tensor, (gate.dtype,), (len(gate), None, None))
    _check_count(name, gate)
    _check_fit(name, gate.shape[1:], up.shape[1:], down.shape[1:])
    return {"w1": torch.cat([gate, up], 1), "w2": down}


def fused(name: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """From gate and up in one tensor, as [E, 2I, H] with down [E, H, I], or both with rows and columns exchanged.

    Exchanged ones ([E, H, 2I] and [E, I, H]: gpt-oss, Llama 4) are copied.
    """
    for projection, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
        checks.tensor(f"{name}.{projection}", "weight", tensor, tuple(SCALE_DTYPES.values()), (None, None, None))
    checks.tensor(f"{name}.down_proj", "weight", down, (gate_up.dtype,), (len(gate_up), None, None))
    _check_count(name, gate_up)
    for w1, w2 in ((gate_up, down), (gate_up.mT, down.mT)):
        if w1.shape[1] == 2 * w2.shape[2] and w1.shape[2] == w2.shape[1]:
            return {"w1": w1.contiguous(), "w2": w2.contiguous()}
    raise ValueError(
        f"{name}: gate_up_proj and down_proj are {list(gate_up.shape)} and {list(down.shape)}; they must be "
        "[E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]"
    )


def biases(name: str, w1: Tensor, w2: Tensor, get: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """w1_bias and w2_bias of dense experts. `get`: the bias of "gate_up" or "gate" and "up", and of "down", if any."""
    gate_up, gate, up, down = (get(projection) for projection in ("gate_up", "gate", "up", "down"))
    if (gate is None) != (up is None):
        raise ValueError(f"{name}: one of gate and up has a bias; both must have one or neither")
    if gate is not None:
        gate_up = torch.cat([gate, up], -1)
    found: Mapping[str, tuple] = {"w1_bias": (gate_up, w1), "w2_bias": (down, w2)}
    for key, (bias, weights) in found.items():
        if bias is not None:
            checks.tensor(name, key, bias, (weights.dtype,), weights.shape[:2])
    return {key: bias for key, (bias, _) in found.items() if bias is not None}


def _check_count(name: str, weights: Tensor) -> None:
    if not len(weights):
        raise ValueError(f"{name}: the tensors have no experts, {list(weights.shape)}")


def _check_fit(name: str, gate: torch.Size, up: torch.Size, down: torch.Size) -> None:
    if gate != up or gate != down[::-1]:
        shapes = [tuple(each) for each in (gate, up, down)]
        raise ValueError(f"{name}: gate, up and down are {shapes}; they must be [I, H], [I, H], [H, I]")
