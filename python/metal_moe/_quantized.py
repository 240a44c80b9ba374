"""Quantised experts as the operators take them: flat lists of tensors in place of `w1` and `w2`.

PyTorch's operators know tensors, lists and numbers. So a function that also takes `QuantizedExperts` is two: the public
one, which takes either, and an operator of its own for quantised weights (`w1: list[Tensor], w1_shape: list[int]`).
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.compiler import is_compiling

from . import _core
from ._operator import engine_of, operator, refuse_gradient
from ._validate import QuantizedShape, check_shared, check_weights, wrong_type, wrong_value
from .formats import QuantizedExperts
from .formats.checks import within
from .formats.dense import dense_buffers
from .formats.layout import ALIGNMENT, Format
from .formats.part import Part
from .formats.quantized_experts import KernelForm

# Formats that the kernels decode (kernels/formats/decoders.h), in any mix with each other and with dense weights.
KERNEL_FORMATS = tuple(sorted(name for name, known in Format.registry.items() if known.IN_KERNELS))
KERNEL_GROUPS = (16, 32, 64, 128)
for _known in Format.registry.values():
    _core.name_format(_known.NUMBER, _known.NAME)
# Weights of rotated activations: kernels of their own (kernels/moe/rotate.metal), for all experts of w1 or of w2.
TRELLIS = "trellis"
# Of a record: what a kernel may be compiled for, in the order that `_core.matrix_code` takes.
_CODE_FIELDS = ("format", "half_bits", "group_size", "codebook", "scale_type")
# Those whose kernels' names tell them; the others' are of "moe_base".
_FAMILIES = ("decode", "prefill4", "large_batch", "simd")
_WEIGHTS = ("w1", "w2", "shared_w1", "shared_w2")


def accepts_quantized(quantized: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Hands calls with `QuantizedExperts` among the weights to the operator `quantized`, with lists in their place."""

    def decorate(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
        op = dense.__name__
        signature = inspect.signature(dense)
        names = frozenset(signature.parameters)
        positional = sum(p.kind is not p.KEYWORD_ONLY for p in signature.parameters.values())

        def check_arguments(args: tuple, kwargs: dict) -> None:
            # The operator has more arguments, which are not the caller's.
            if len(args) > positional or any(name not in names for name in kwargs):
                try:
                    signature.bind(*args, **kwargs)
                except TypeError as error:
                    raise TypeError(f"{op}: {error}") from None

        @functools.wraps(dense)
        def call(*args, **kwargs) -> Tensor:
            w1 = args[1] if len(args) > 1 else kwargs.get("w1")
            w2 = args[2] if len(args) > 2 else kwargs.get("w2")
            for weights in (w1, w2, kwargs.get("shared_w1"), kwargs.get("shared_w2")):
                if isinstance(weights, QuantizedExperts):
                    check_arguments(args, kwargs)
                    return _call_quantized(op, quantized, *args, **kwargs)
            return dense(*args, **kwargs)

        return call

    return decorate


def _call_quantized(op, quantized, hidden_states, w1, w2, *args, shared_w1=None, shared_w2=None, **kwargs) -> Tensor:
    given = dict(zip(_WEIGHTS, (w1, w2, shared_w1, shared_w2), strict=True))
    shared = [name for name in _WEIGHTS[2:] if given[name] is not None]
    for name in shared:
        if isinstance(given[name], QuantizedExperts) and given[name].bias is not None:
            wrong_value(op, name, "with a bias", "without: shared experts have none")
    trellis = [name for name in _WEIGHTS if _has_trellis(given[name])]
    if trellis and (shared or kwargs.get("shared_weights") is not None):
        return _apart(op, quantized, hidden_states, given, args, kwargs)
    gated = kwargs.get("activation", "silu") != "relu2"
    interleaved = kwargs.get("interleaved", False)
    for name in ("w1", "shared_w1"):
        if isinstance(given[name], QuantizedExperts) and len(given[name].parts) == 2:
            if not gated:
                wrong_value(op, name, "a pair of gate and up", 'one matrix per expert with activation "relu2"')
            if interleaved is True:
                wrong_value(op, "interleaved", True, f"False where gate and up of {name} are parts of their own")
    for name in ("w1", "w2"):
        own = given[name].bias if isinstance(given[name], QuantizedExperts) else None
        if own is not None:
            if kwargs.get(f"{name}_bias") is not None:
                wrong_value(op, f"{name}_bias", "given", f"None where {name} has a bias of its own")
            if isinstance(hidden_states, Tensor) and own.dtype != hidden_states.dtype:
                _core.count_fallback("converted_bias", copies=True)
                own = own.to(hidden_states.dtype)
            kwargs[f"{name}_bias"] = own
    for name in trellis:
        kwargs[f"trellis_{name}"] = True
    # The routed and the shared experts of a product run in one dispatch: as parts, both, where one of them is.
    flat = []
    for name, other in (("w1", "shared_w1"), ("w2", "shared_w2"), ("shared_w1", "w1"), ("shared_w2", "w2")):
        parts = isinstance(given[name], QuantizedExperts) or isinstance(given[other], QuantizedExperts)
        pair = gated and name.endswith("w1")
        dtype = hidden_states.dtype if isinstance(hidden_states, Tensor) else None
        flat += _flat(op, name, given[name], pair, pair and interleaved is True, name in trellis, parts, dtype)
    kwargs["codes"] = [
        *_codes(w1, shared_w1, gated, gated and interleaved is True),
        *([] if gated else [0]),
        *_codes(w2, shared_w2, False, False),
    ]
    return quantized(hidden_states, *flat, *args, **kwargs)


def _apart(op, quantized, hidden_states, given, args, kwargs) -> Tensor:
    """Where one of the weights is trellis: routed experts, then shared ones as a layer of their own, then the sum."""
    from . import experts

    shared_weights = kwargs.pop("shared_weights", None)
    w1, w2, shared_w1, shared_w2 = given.values()
    if isinstance(w1, QuantizedExperts) or isinstance(w2, QuantizedExperts):
        routed = _call_quantized(op, quantized, hidden_states, w1, w2, *args, **kwargs)
    else:
        routed = getattr(experts, op)(hidden_states, w1, w2, *args, **kwargs)
    tokens, hidden = hidden_states.shape
    shapes = [QuantizedShape(w.shape) if isinstance(w, QuantizedExperts) else w for w in (shared_w1, shared_w2)]
    gated = kwargs.get("activation", "silu") != "relu2"
    count = check_shared(op, *shapes, shared_weights, hidden_states.dtype, tokens, hidden, gated)
    if shared_weights is None:
        shared_weights = hidden_states.new_ones(1, 1).expand(tokens, count)
    ids = torch.arange(count, dtype=torch.int32, device=hidden_states.device).expand(tokens, count)
    options = ("activation", "interleaved", "alpha", "limit", "use_fp32_acc", "kernel")
    kept = {name: kwargs[name] for name in options if name in kwargs}
    if isinstance(kept.get("kernel"), str):  # which may be the name of the routed experts' own kernels
        kept["kernel"] = "moe_" + next((name for name in _FAMILIES if name in kept["kernel"]), "base")
    return _sum(routed, experts.fused_experts(hidden_states, shared_w1, shared_w2, shared_weights, ids, **kept))


@operator
def _sum(routed: Tensor, shared: Tensor) -> Tensor:
    if engine_of(routed) is not None:
        _core.settle_batch()  # PyTorch reads both now
    return routed + shared


def _has_trellis(weights: QuantizedExperts | Tensor | None) -> bool:
    return isinstance(weights, QuantizedExperts) and TRELLIS in weights.formats


def _flat(
    op: str,
    name: str,
    weights: QuantizedExperts | Tensor | None,
    pair: bool,
    interleaved: bool,
    trellis: bool,
    parts: bool,
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[int]]:
    """Tensors and shape: those of gate, then of up for a `pair`; of dense weights the one tensor, unless as `parts`."""
    if weights is None:
        return [], []
    if not isinstance(weights, QuantizedExperts):
        if not isinstance(weights, Tensor):
            wrong_type(op, name, f"of type {type(weights).__name__}", "a torch.Tensor or QuantizedExperts")
        if torch.is_grad_enabled():  # the operator looks for gradients of tensors, not of lists
            refuse_gradient(op, name, weights)
        if not parts:
            return [weights], list(weights.shape)
        if dtype is not None:
            check_weights(op, name, weights, dtype)
        return dense_buffers(weights, 2 if pair else 1, interleaved), list(weights.shape)
    if not pair and len(weights.parts) == 2:
        wrong_value(op, name, "a pair of gate and up", "one matrix per expert")
    if is_compiling():
        # A trace does not have the records' values. What it then finds is guarded like any other object.
        weights.untraced(_make_form, op, name, pair, interleaved, trellis)
    form = _known_form(weights, pair, interleaved)
    if form is None:
        _make_form(weights, op, name, pair, interleaved, trellis)
        form = weights.kernel_forms[pair, interleaved]
    return form.buffers, list(weights.shape)


def _known_form(weights: QuantizedExperts, pair: bool, interleaved: bool) -> KernelForm | None:
    """What an earlier call has made of the weights, if it was of the parts that they have now."""
    form = weights.kernel_forms.get((pair, interleaved))
    parts = tuple(weights.parts.values())
    if form is None or len(form.parts) != len(parts) or any(a is not b for a, b in zip(form.parts, parts, strict=True)):
        return None
    return form


def _make_form(weights: QuantizedExperts, op: str, name: str, pair: bool, interleaved: bool, trellis: bool) -> None:
    # Taking gate and up apart checks every record again: once per layer is enough.
    if _known_form(weights, pair, interleaved) is not None:
        return
    now = QuantizedExperts(weights.parts).shape
    if now != weights.shape:
        wrong_value(op, name, f"of parts that were replaced by those of {tuple(now)}", tuple(weights.shape))
    if pair and weights.shape[1] % 2:
        wrong_value(op, name, f"of shape {tuple(weights.shape)}", "of an even number of rows, gate and up")
    with within(f"{op}: {name}"), unset_fake_temporarily():  # what is made is kept
        of_weights = weights.gate_up(interleaved) if pair else (weights.parts["weight"],)
    for part in of_weights:
        _check_formats(op, name, part, trellis)
    buffers = [tensor for part in of_weights for tensor in (part.codes, part.scales, part.biases, part.table)]
    codes = [_matrix_code(part) for part in of_weights]
    parts = tuple(weights.parts.values())
    weights.kernel_forms[pair, interleaved] = KernelForm(parts, tuple(now), buffers, codes, trellis)


def _codes(
    weights: QuantizedExperts | Tensor, shared: QuantizedExperts | Tensor | None, pair: bool, interleaved: bool
) -> list[int]:
    """How the parts that `_flat` gave are stored, for kernels that are compiled for it; 0: not all experts alike."""

    def of(given: QuantizedExperts | Tensor) -> list[int]:
        known = isinstance(given, QuantizedExperts)
        return given.kernel_forms[pair, interleaved].codes if known else [0, 0] if pair else [0]

    own = of(weights)
    return own if shared is None else [a if a == b else 0 for a, b in zip(own, of(shared), strict=True)]


def _matrix_code(part: Part) -> int:
    records = part.records
    if any((records[field] != records[field][0]).any() for field in _CODE_FIELDS):
        return 0
    aligned = not ((records["codes"] | records["codes_stride"]) % ALIGNMENT).any()
    return _core.matrix_code(*(int(records[field][0]) for field in _CODE_FIELDS), aligned)


def _check_formats(op: str, name: str, part: Part, trellis: bool) -> None:
    for expert, settings in enumerate(part.settings):
        if trellis and settings.format != TRELLIS:
            must = f"trellis, as others of {name} are: with those its experts, gate and up share no kernel"
            wrong_value(op, name, f"{settings.format} (expert {expert})", must)
        if not trellis and settings.format in KERNEL_FORMATS and settings.group_size not in KERNEL_GROUPS:
            must = f"in groups that kernels know: {', '.join(map(str, KERNEL_GROUPS))}"
            wrong_value(op, name, f"in groups of {settings.group_size} columns (expert {expert})", must)
        if not trellis and settings.format not in KERNEL_FORMATS:
            must = f"of a format that kernels decode with the others: {', '.join(KERNEL_FORMATS)}"
            wrong_value(op, name, f"{settings.format} (expert {expert})", must)
