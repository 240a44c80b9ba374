"""Calls like an earlier one take a short way.

A call's checks, plan and kernel arguments depend on the types, shapes, strides, dtypes and device of its tensors and on
its other arguments, and on nothing that lies in memory; quantised weights are as many tensors, those that an earlier
call has made of them (`KernelForm`). So where all of these are those of an earlier call, which was checked, the
extension runs the call at once (csrc/bindings/known_calls.cpp). It declines, having done nothing, whatever it has not
seen and whatever `_operator` would not run directly; such a call then takes the ordinary way.
"""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.compiler import is_compiling

from . import _core
from ._validate import ACTIVATIONS, GROUP_SCORES, SCORINGS
from .formats import QuantizedExperts

# Parameters whose text stands for a number in the kernels.
_CHOICES = {"activation": ACTIVATIONS, "scoring": SCORINGS, "group_score": GROUP_SCORES}

P = ParamSpec("P")
R = TypeVar("R")


def remembers_calls(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which is fused_experts or fused_moe with all of its decorators, with the short way in front."""
    parameters = inspect.signature(function).parameters.values()
    known_call = _core.known_call(
        function.__name__,
        tuple(p.name for p in parameters),
        tuple(p.default for p in parameters if p.default is not p.empty),
        sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters),
        _CHOICES,
        QuantizedExperts,
    )

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Asked here, not in the extension, so that torch.compile never sees the latter.
        if not is_compiling():
            result = known_call(*args, **kwargs)
            if result is not None:
                return result
        return function(*args, **kwargs)

    call.known_call = known_call  # alone: bench/call_overhead.py
    return call
