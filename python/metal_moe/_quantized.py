"""Quantised experts as the operators take them: flat lists of tensors in place of `w1` and `w2`.

PyTorch's operators know tensors, lists and numbers. So a function that also takes `QuantizedExperts` is two: the public
one, which takes either, and an operator of its own for quantised weights (`w1: list[Tensor], w1_shape: list[int]`).
"""

import functools
from collections.abc import Callable

from torch import Tensor

from . import _core
from ._validate import wrong_type, wrong_value
from .formats import QuantizedExperts
from .formats.layout import ALIGNMENT
from .formats.part import Part

# Formats that the kernels decode (kernels/formats/decoders.h), in any mix with each other and with dense weights.
KERNEL_FORMATS = ("affine", "mxfp4", "mxfp8", "nvfp4")
# Weights of rotated activations: kernels of their own (kernels/moe/rotate.metal), for w1 and w2 alike.
TRELLIS = "trellis"
# Of a record: what a kernel may be compiled for, in the order that `_core.matrix_code` takes.
_CODE_FIELDS = ("format", "half_bits", "group_size", "codebook", "scale_type")
_SHARED = ("shared_w1", "shared_w2", "shared_weights")


def accepts_quantized(quantized: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Hands calls whose w1 or w2 is `QuantizedExperts` to the operator `quantized`, with lists in their place."""

    def decorate(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
        op = dense.__name__

        @functools.wraps(dense)
        def call(*args, **kwargs) -> Tensor:
            w1 = args[1] if len(args) > 1 else kwargs.get("w1")
            w2 = args[2] if len(args) > 2 else kwargs.get("w2")
            if isinstance(w1, QuantizedExperts) or isinstance(w2, QuantizedExperts):
                return _call_quantized(op, quantized, *args, **kwargs)
            return dense(*args, **kwargs)

        return call

    return decorate


def _call_quantized(op, quantized, hidden_states, w1, w2, *args, **kwargs) -> Tensor:
    for name in _SHARED:
        if kwargs.pop(name, None) is not None:
            wrong_value(op, name, "given", "None where w1 or w2 is quantised: shared experts are dense only")
    gated = kwargs.get("activation", "silu") != "relu2"
    interleaved = kwargs.get("interleaved", False)
    if isinstance(w1, QuantizedExperts) and len(w1.parts) == 2:
        if not gated:
            wrong_value(op, "w1", "a pair of gate and up", 'one matrix per expert with activation "relu2"')
        if interleaved is True:
            wrong_value(op, "interleaved", True, "False where gate and up of w1 are parts of their own")
    for name, weights in (("w1_bias", w1), ("w2_bias", w2)):
        own = weights.bias if isinstance(weights, QuantizedExperts) else None
        if own is not None:
            if kwargs.get(name) is not None:
                wrong_value(op, name, "given", f"None where {name[:2]} has a bias of its own")
            if isinstance(hidden_states, Tensor) and own.dtype != hidden_states.dtype:
                _core.count_fallback("converted_bias", copies=True)
                own = own.to(hidden_states.dtype)
            kwargs[name] = own
    trellis = any(_has_trellis(weights) for weights in (w1, w2))
    if trellis:
        for name, weights in (("w1", w1), ("w2", w2)):
            if not _has_trellis(weights):
                wrong_value(op, name, "of another format", "trellis, as the other of w1 and w2 is")
        if kwargs.get("kernel") is not None:
            wrong_value(op, "kernel", kwargs["kernel"], "None with trellis weights, which have kernels of their own")
        kwargs["trellis"] = True
    flat = (
        *_flat(op, "w1", w1, gated, interleaved is True, trellis),
        *_flat(op, "w2", w2, False, False, trellis),
    )
    codes = [*_codes(w1, gated, interleaved is True), *_codes(w2, False, False)]
    kwargs["codes"] = codes if gated else [codes[0], 0, codes[1]]
    return quantized(hidden_states, *flat, *args, **kwargs)


def _has_trellis(weights: QuantizedExperts | Tensor) -> bool:
    return isinstance(weights, QuantizedExperts) and any(
        settings.format == TRELLIS for part in weights.parts.values() for settings in part.settings
    )


def _flat(
    op: str, name: str, weights: QuantizedExperts | Tensor, pair: bool, interleaved: bool, trellis: bool
) -> tuple:
    """Tensors and shape: those of gate, then of up for a `pair`; of dense weights the one tensor."""
    if not isinstance(weights, QuantizedExperts):
        if not isinstance(weights, Tensor):
            wrong_type(op, name, f"of type {type(weights).__name__}", "a torch.Tensor or QuantizedExperts")
        return [weights], list(weights.shape)
    if not pair and len(weights.parts) == 2:
        wrong_value(op, name, "a pair of gate and up", "one matrix per expert")
    # Taking gate and up apart checks every record again: once per layer is enough.
    cached = weights.kernel_buffers.get((pair, interleaved))
    if cached is None:
        if pair and weights.shape[1] % 2:
            wrong_value(op, name, f"of shape {tuple(weights.shape)}", "of an even number of rows, gate and up")
        parts = weights.gate_up(interleaved) if pair else (weights.parts["weight"],)
        for part in parts:
            _check_formats(op, name, part, (TRELLIS,) if trellis else KERNEL_FORMATS)
        cached = [tensor for part in parts for tensor in (part.codes, part.scales, part.biases, part.table)]
        weights.kernel_buffers[pair, interleaved] = cached
        weights.kernel_codes[pair, interleaved] = [_matrix_code(part) for part in parts]
    return cached, list(weights.shape)


def _codes(weights: QuantizedExperts | Tensor, pair: bool, interleaved: bool) -> list[int]:
    """How the parts that `_flat` gave are stored, for kernels that are compiled for it; 0: not all experts alike."""
    if isinstance(weights, QuantizedExperts):
        return weights.kernel_codes[pair, interleaved]
    return [0, 0] if pair else [0]


def _matrix_code(part: Part) -> int:
    records = part.records
    if any((records[field] != records[field][0]).any() for field in _CODE_FIELDS):
        return 0
    aligned = not ((records["codes"] | records["codes_stride"]) % ALIGNMENT).any()
    return _core.matrix_code(*(int(records[field][0]) for field in _CODE_FIELDS), aligned)


def _check_formats(op: str, name: str, part: Part, known: tuple[str, ...]) -> None:
    for expert, settings in enumerate(part.settings):
        if settings.format not in known:
            must = f"of a format that kernels decode with the others: {', '.join(known)}"
            wrong_value(op, name, f"{settings.format} (expert {expert})", must)
