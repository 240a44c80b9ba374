"""Runs tests that make CPU tensors on another device: `pytest --device cuda`.

The public functions are replaced by ones that copy each tensor's whole storage to the device, give the kernel a view of
it with the same shape, strides and offset, and copy the results back. Poison around a tensor travels with it, and an
input that comes back changed is an error. Calls that the CPU must see (fake and meta tensors, gradients, compilation,
`use_engine`) pass through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import metal_moe
import pytest
import torch
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _len_torch_dispatch_stack

FUNCTIONS = ("fused_topk", "fused_experts", "fused_moe", "group_tokens", "gather_experts", "matmul", "lora")
QUERIES = ("kernels", "device_info", "pool_stats", "pool_trim")


def can_move(values: list) -> bool:
    """Whether a call on these arguments is an ordinary one on CPU tensors."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    plain = (torch.Tensor, torch.nn.Parameter)
    return bool(tensors) and all(
        type(tensor) in plain
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of the tensor's storage, whichever of them it shows."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def moving(function: Callable, device: torch.device) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        values = [*args, *kwargs.values()]
        if is_compiling() or _len_torch_dispatch_stack() or not can_move(values):
            return function(*args, **kwargs)
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []

        def move(value):
            if isinstance(value, metal_moe.QuantizedExperts):
                return value.to(device)
            if not isinstance(value, torch.Tensor):
                return value
            storage = storage_of(value)
            copy = storage.to(device)
            copies.append((storage, copy))
            return copy.as_strided(value.shape, value.stride(), value.storage_offset())

        result = function(*map(move, args), **{name: move(value) for name, value in kwargs.items()})
        for storage, copy in copies:
            assert same_bits(storage, copy.cpu()), f"{function.__name__} has changed an input or the memory around it"
        if isinstance(result, torch.Tensor):
            return result.cpu()
        back = [None if one is None else one.cpu() for one in result]
        return type(result)(*back) if hasattr(result, "_fields") else tuple(back)

    call.__wrapped__, call.moves = function, True
    return call


def patch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Until the end of the test, `metal_moe` computes on `device`."""
    for name in FUNCTIONS:
        monkeypatch.setattr(metal_moe, name, moving(getattr(metal_moe, name), device))
    for name in QUERIES:
        original = getattr(metal_moe, name)
        monkeypatch.setattr(metal_moe, name, functools.partial(_query, original, device))


def unpatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test, `metal_moe` computes where its tensors are."""
    for name in FUNCTIONS:
        if getattr(getattr(metal_moe, name), "moves", False):
            monkeypatch.setattr(metal_moe, name, getattr(metal_moe, name).__wrapped__)
    for name in QUERIES:
        if isinstance(getattr(metal_moe, name), functools.partial):
            monkeypatch.setattr(metal_moe, name, getattr(metal_moe, name).args[0])


def _query(original: Callable, default: torch.device, device=None):
    return original(default if device is None else device)
