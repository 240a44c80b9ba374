"""How a Python function becomes a PyTorch operator without costing an eager call the dispatcher.

`@operator` registers the decorated function as `torch.ops.metal_moe.<name>`. Its body checks, allocates the result and
calls the binding where there is something to compute (`engine_of`); the same body therefore serves as the operator's
fake implementation. An eager call on ordinary tensors goes straight to that body: a dispatcher round trip costs 4 us
(`torch.library.custom_op`: 14 us), as much as the rest of the call. Everything that must see the operator
(torch.compile, dispatch and function modes, tensor subclasses, functorch, the profiler, autograd) takes the dispatcher.
"""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.autograd.profiler as profiler
from torch import Tensor, is_grad_enabled
from torch._C import (
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from . import _core
from ._nvrtc import nvrtc_library
from ._validate import SHAPE_ONLY_DEVICE, SUPPORTED_DEVICES, choices

NAMESPACE = "metal_moe"
CPU_ENGINE_VARIABLE = "METAL_MOE_CPU_ENGINE"
CPU_ENGINES = ("native", "exact")

_library = torch.library.Library(NAMESPACE, "DEF")
# Weights are read where they lie: a compiler must not hand over another layout than the traced one.
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# Public argument -> argument of the operator: Inductor hands keyword arguments on by name to a function of its own that
# has an argument named `kernel`.
_RENAMED = {"kernel": "family"}

_PLAIN_TYPES = (Tensor, Parameter)

P = ParamSpec("P")
R = TypeVar("R")


def cpu_engine() -> str:
    """The engine that runs CPU tensors: METAL_MOE_CPU_ENGINE, read on every call so that a test can change it."""
    engine = _core.cpu_engine()
    if engine is not None:
        return engine
    was = os.environ.get(CPU_ENGINE_VARIABLE)
    raise ValueError(f'{CPU_ENGINE_VARIABLE} is "{was}"; it must be {choices(CPU_ENGINES)}')


_nvrtc_was_sought = False


def cuda_engine(device: torch.device) -> str:
    """The engine of a CUDA device: "cuda" for the first one, then "cuda:1", ..."""
    global _nvrtc_was_sought
    if not _nvrtc_was_sought:
        _core.set_nvrtc_path(nvrtc_library() or "")
        _nvrtc_was_sought = True
    if device.index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    else:
        index = device.index
    return f"cuda:{index}" if index else "cuda"


def engine_of(tensor: Tensor) -> str | None:
    """The engine that computes `tensor`; None where it has no memory (fake and meta tensors)."""
    if type(tensor) is not Tensor and isinstance(tensor, FakeTensor):
        return None
    device = tensor.device
    if device.type == SHAPE_ONLY_DEVICE:
        return None
    if device.type in SUPPORTED_DEVICES:
        return engine_of_device(device)
    raise ValueError(f"tensors are on device {device}; this build computes tensors on {choices(SUPPORTED_DEVICES)}")


def engine_of_device(device: torch.device) -> str:
    """The engine of a supported device."""
    if device.type == "cpu":
        return cpu_engine()
    return cuda_engine(device) if device.type == "cuda" else device.type


def operator(
    function: Callable[P, R] | None = None,
    *,
    name: str | None = None,
    autograd: tuple[Callable[..., None], Callable[..., object]] | None = None,
) -> Callable[P, R]:
    """Registers `function` as the operator `name` (its own), schema from its annotations.

    `autograd`: setup_context and backward, as `torch.library.register_autograd` takes them; without, an argument that
    requires a gradient is refused.
    """
    if function is None:
        return functools.partial(operator, name=name, autograd=autograd)
    name = name or function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    for public, internal in _RENAMED.items():
        schema = schema.replace(f" {public}=", f" {internal}=")
    _library.define(name + schema, tags=_tags)
    op = getattr(torch.ops.metal_moe, name).default

    def implementation(*args, **kwargs):
        for public, internal in _RENAMED.items():
            if internal in kwargs:
                kwargs[public] = kwargs.pop(internal)
        return function(*args, **kwargs)

    def refuse_gradients(*args, **kwargs):
        if is_grad_enabled():
            for argument, value in zip(op._schema.arguments, args, strict=False):
                refuse_gradient(name, argument.name, value)
            for argument_name, value in kwargs.items():
                refuse_gradient(name, argument_name, value)
        with _AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    if autograd is None:
        _library.impl(name, refuse_gradients, "Autograd")
    else:
        setup_context, backward = autograd
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)
    torch.library.register_fake(f"{NAMESPACE}::{name}", implementation, lib=_library)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _is_direct(args, kwargs):
            return function(*args, **kwargs)
        for public, internal in _RENAMED.items():
            if public in kwargs:
                kwargs[internal] = kwargs.pop(public)
        return op(*args, **kwargs)

    return call


def _is_direct(args: tuple, kwargs: dict) -> bool:
    if (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
    ):
        return False
    gradients = is_grad_enabled()
    for values in (args, kwargs.values()) if kwargs else (args,):
        for value in values:
            # An ordinary tensor, whose memory holds its values (no lazy negation), with no gradient to refuse.
            if isinstance(value, Tensor) and (
                type(value) not in _PLAIN_TYPES or value.is_neg() or (gradients and value.requires_grad)
            ):
                return False
    return True


def refuse_gradient(op: str, name: str, value: object) -> None:
    if isinstance(value, Tensor) and value.requires_grad:
        raise RuntimeError(
            f"{op}: {name} requires grad, but metal_moe is for inference and has no backward: "
            f"call it under torch.inference_mode() or torch.no_grad(), or pass {name}.detach()"
        )
