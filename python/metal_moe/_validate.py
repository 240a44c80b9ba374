"""What each argument of the public functions may be; every violation is an error that says so.

TypeError: a wrong Python type or dtype. ValueError: a wrong shape, layout, device or value. The message gives the
operation, the argument, what it was and what it must be. Checks run on every call, in front of kernels that take
microseconds: they compare identities and small tuples, and build text only when they fail. They also run on fake
tensors (`torch.compile`), where a size may be symbolic.
"""

import math
import sys
from typing import NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)

# Names of the public interface -> numbers of kernels/moe/{experts,route}.h.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3, "swiglu_clamp": 4}
SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2, "topk_softmax": 3}
GROUP_SCORES = {"max": 0, "top2_sum": 1}

# Limits of the kernels (kernels/moe/{route,group}.h).
MAX_EXPERTS = 1024
MAX_TOP_K = 16
MAX_ASSIGNMENTS = 1 << 22
# Sizes and strides reach the kernels as 32-bit words.
MAX_SIZE = (1 << 31) - 1
MAX_FLOAT = torch.finfo(torch.float32).max

# On macOS Apple's Metal computes, elsewhere the stand-in's engines. The first one is the default of functions that take
# a device. Meta tensors have no engine; operations on them give shapes only.
SUPPORTED_DEVICES = ("mps",) if sys.platform == "darwin" else ("cpu", "cuda")
DEFAULT_DEVICE = SUPPORTED_DEVICES[0]
SHAPE_ONLY_DEVICE = "meta"


class QuantizedShape:
    """Stands for quantised weights in checks: what is in their buffers was checked when they were made."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = tuple(shape)


def choices(names) -> str:
    """'"a", "b" or "c"'"""
    quoted = [f'"{name}"' if isinstance(name, str) else str(name) for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]


def wrong_type(op: str, name: str, was: object, must: str) -> NoReturn:
    raise TypeError(f"{op}: {name} is {was}; it must be {must}")


def wrong_value(op: str, name: str, was: object, must: str) -> NoReturn:
    raise ValueError(f"{op}: {name} is {was}; it must be {must}")


def wrong_shape(op: str, name: str, tensor: Tensor, must: str) -> NoReturn:
    raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {must}")


def check_tensor(op: str, name: str, value: object, dtypes: tuple, ndim: int, layout: str) -> None:
    """A strided tensor of one of `dtypes` with `ndim` dimensions; `layout` is their names for the message."""
    if not isinstance(value, Tensor):
        wrong_type(op, name, f"of type {type(value).__name__}", f"a torch.Tensor {layout}")
    if value.dtype not in dtypes:
        wrong_type(op, name, value.dtype, choices(dtypes))
    if value.layout is not torch.strided:
        wrong_value(op, name, f"a {value.layout} tensor", "a dense (torch.strided) tensor")
    if value.ndim != ndim:
        wrong_shape(op, name, value, f"{layout} ({ndim} dimensions)")


def check_int(op: str, name: str, value: object, low: int, high: int, why: str = "") -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
        wrong_type(op, name, f"{value!r} of type {type(value).__name__}", "an int")
    if not low <= value <= high:
        wrong_value(op, name, value, f"from {low} to {high}{why}")


def check_bool(op: str, name: str, value: object) -> None:
    if value is not True and value is not False:
        wrong_type(op, name, f"{value!r} of type {type(value).__name__}", "True or False")


def check_number(op: str, name: str, value: object) -> None:
    """A finite number of float32, which is what kernels compute with."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float))):
        wrong_type(op, name, f"{value!r} of type {type(value).__name__}", "a float")
    if not -MAX_FLOAT <= value <= MAX_FLOAT:
        wrong_value(op, name, value, f"a finite number, at most {MAX_FLOAT:.4g} in size")


def check_choice(op: str, name: str, value: object, table: dict) -> int:
    if not isinstance(value, str):
        wrong_type(op, name, f"{value!r} of type {type(value).__name__}", choices(table))
    number = table.get(value)
    if number is None:
        wrong_value(op, name, repr(value), choices(table))
    return number


def check_devices(op: str, names: tuple, tensors: tuple) -> None:
    """All on the device of the first one, which must be supported. `names` are those of `tensors`; None is skipped."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            break
    else:
        return
    device = tensors[0].device
    if device.type not in SUPPORTED_DEVICES and device.type != SHAPE_ONLY_DEVICE:
        wrong_value(op, names[0], f"on device {device}", f"on a supported device: {choices(SUPPORTED_DEVICES)}")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.device != device:
            wrong_value(op, name, f"on device {tensor.device}", f"on {device}, the device of {names[0]}")


def check_routing(
    op: str,
    router_logits: Tensor,
    top_k: int,
    scoring: str,
    correction_bias: Tensor | None,
    num_expert_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    renormalize_epsilon: float | None,
    routed_scaling_factor: float,
) -> tuple:
    """Checks the arguments of `fused_topk`; returns the routing arguments of the binding, in its order."""
    check_tensor(op, "router_logits", router_logits, FLOAT_DTYPES, 2, "[T, E]")
    experts = router_logits.shape[1]
    if not 1 <= experts <= MAX_EXPERTS:
        wrong_shape(op, "router_logits", router_logits, f"[T, E] with E from 1 to {MAX_EXPERTS}")
    scoring_number = check_choice(op, "scoring", scoring, SCORINGS)
    group_score_number = check_choice(op, "group_score", group_score, GROUP_SCORES)
    if not (type(top_k) is int and 1 <= top_k <= MAX_TOP_K and top_k <= experts):
        check_int(op, "top_k", top_k, 1, min(MAX_TOP_K, experts), f" (E is {experts}, the limit {MAX_TOP_K})")
    if num_expert_group != 1 or topk_group != 1 or type(num_expert_group) is not int:
        _check_groups(op, experts, top_k, num_expert_group, topk_group, group_score)
    if correction_bias is not None:
        check_tensor(op, "correction_bias", correction_bias, FLOAT_DTYPES, 1, "[E]")
        if correction_bias.shape[0] != experts:
            wrong_shape(op, "correction_bias", correction_bias, f"[E] = ({experts},)")
        if not correction_bias.is_contiguous():
            wrong_value(op, "correction_bias", f"strided {correction_bias.stride()}", "contiguous")
    check_bool(op, "renormalize", renormalize)
    if renormalize_epsilon is not None:
        check_number(op, "renormalize_epsilon", renormalize_epsilon)
        if renormalize_epsilon < 0.0:
            wrong_value(op, "renormalize_epsilon", renormalize_epsilon, "at least 0")
    check_number(op, "routed_scaling_factor", routed_scaling_factor)
    return (
        scoring_number,
        num_expert_group,
        topk_group,
        group_score_number,
        renormalize,
        renormalize_epsilon,
        routed_scaling_factor,
    )


def _check_groups(op: str, experts: int, top_k: int, groups: int, chosen: int, group_score: str) -> None:
    check_int(op, "num_expert_group", groups, 1, experts, f" (E is {experts})")
    if experts % groups:
        wrong_value(op, "num_expert_group", groups, f"a divisor of the number of experts, {experts}")
    check_int(op, "topk_group", chosen, 1, groups, " (num_expert_group)")
    group_size = experts // groups
    if top_k > chosen * group_size:
        reason = f"the {chosen} chosen groups hold {chosen * group_size} experts"
        wrong_value(op, "top_k", top_k, f"at most {chosen * group_size}: {reason}")
    if groups > 1 and group_score == "top2_sum" and group_size < 2:
        wrong_value(
            op, "group_score", '"top2_sum"', f'"max" where a group is one expert (E = {experts} in {groups} groups)'
        )


def check_experts(
    op: str,
    hidden_states: Tensor,
    w1: Tensor | QuantizedShape,
    w2: Tensor | QuantizedShape,
    top_k: int,
    activation: str,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
    shared_w1: Tensor | QuantizedShape | None,
    shared_w2: Tensor | QuantizedShape | None,
    shared_weights: Tensor | None,
    use_fp32_acc: bool,
    kernel: str | None,
) -> int:
    """Checks hidden states, experts and how they are computed; returns the activation's number.

    Routing weights and ids are checked by `check_assignments` (given) or `check_routing` (computed), the name of a
    kernel family where the kernel table is.
    """
    check_tensor(op, "hidden_states", hidden_states, FLOAT_DTYPES, 2, "[T, H]")
    dtype = hidden_states.dtype
    tokens, hidden = hidden_states.shape
    if hidden < 1:
        wrong_shape(op, "hidden_states", hidden_states, "[T, H] with H at least 1")
    if not hidden_states.is_contiguous():
        check_rows(op, "hidden_states", hidden_states)
    activation_number = check_choice(op, "activation", activation, ACTIVATIONS)
    gated = activation_number != ACTIVATIONS["relu2"]
    experts, intermediate = _check_weight_pair(op, "w1", w1, "w2", w2, "E", "I", dtype, hidden, gated)
    shared = 0
    if shared_w1 is not None or shared_w2 is not None or shared_weights is not None:
        shared = check_shared(op, shared_w1, shared_w2, shared_weights, dtype, tokens, hidden, gated)
    if w1_bias is not None:
        _check_bias(op, "w1_bias", w1_bias, dtype, (experts, w1.shape[1]), "[E, 2I]" if gated else "[E, I]")
    if w2_bias is not None:
        _check_bias(op, "w2_bias", w2_bias, dtype, (experts, hidden), "[E, H]")
    if experts + shared > MAX_EXPERTS:
        wrong_shape(op, "w1", w1, f"at most {MAX_EXPERTS} experts in all (here {experts} and {shared} shared)")
    if tokens * (top_k + shared) > MAX_ASSIGNMENTS:
        wrong_shape(
            op,
            "hidden_states",
            hidden_states,
            f"at most {MAX_ASSIGNMENTS // (top_k + shared)} tokens: {MAX_ASSIGNMENTS} assignments of "
            f"{top_k + shared} experts each",
        )
    check_bool(op, "interleaved", interleaved)
    if interleaved and not gated:
        wrong_value(op, "interleaved", True, 'False with activation "relu2", which has no gate to interleave')
    check_number(op, "alpha", alpha)
    if limit != math.inf:
        check_number(op, "limit", limit)
    if limit <= 0.0:
        wrong_value(op, "limit", limit, "above 0 (math.inf: no clamp)")
    check_bool(op, "use_fp32_acc", use_fp32_acc)
    if kernel is not None and not isinstance(kernel, str):
        wrong_type(op, "kernel", f"{kernel!r} of type {type(kernel).__name__}", "a str or None")
    return activation_number


def check_rows(op: str, name: str, tensor: Tensor) -> None:
    """Rows may lie anywhere; the elements of a row are neighbours."""
    row_stride, stride = tensor.stride()
    if stride != 1 and tensor.shape[1] != 1:
        wrong_value(op, name, f"strided {tensor.stride()}", "contiguous in its last dimension (stride 1)")
    if row_stride > MAX_SIZE:
        wrong_value(op, name, f"strided {tensor.stride()}", f"strided by at most {MAX_SIZE} elements")


def check_weights(op: str, name: str, weight: Tensor, dtype: torch.dtype, layout: tuple[str, ...] = ()) -> None:
    """Dense weights of all experts; `layout`: what the dimensions are, in pieces of text."""
    if not isinstance(weight, Tensor):
        wrong_type(op, name, f"of type {type(weight).__name__}", f"a torch.Tensor {''.join(layout)}")
    if weight.dtype is not dtype:
        wrong_type(op, name, weight.dtype, f"{dtype}, the dtype of hidden_states")
    if weight.ndim != 3:
        wrong_shape(op, name, weight, f"{''.join(layout)} (3 dimensions)".strip())
    if not weight.is_contiguous():
        must = "contiguous: pass weights as stored, or call .contiguous() once at load"
        wrong_value(op, name, f"strided {weight.stride()}", must)


def _check_weight_pair(
    op: str,
    name1: str,
    w1: Tensor | QuantizedShape,
    name2: str,
    w2: Tensor | QuantizedShape,
    count: str,
    inner: str,
    dtype: torch.dtype,
    hidden: int,
    gated: bool,
) -> tuple:
    rows_name = "2" + inner if gated else inner
    for name, weight, layout in (
        (name1, w1, ("[", count, ", ", rows_name, ", H]")),
        (name2, w2, ("[", count, ", H, ", inner, "]")),
    ):
        if not isinstance(weight, QuantizedShape):
            check_weights(op, name, weight, dtype, layout)
    experts, rows, width = w1.shape
    if width != hidden or experts < 1 or rows < 1 or (gated and rows % 2):
        even = " and an even number of rows, gate and up" if gated else ""
        wrong_shape(op, name1, w1, f"[{count}, {rows_name}, H] with H = {hidden} as in hidden_states{even}")
    intermediate = rows // 2 if gated else rows
    if w2.shape != (experts, hidden, intermediate):
        must = f"[{count}, H, {inner}] = {(experts, hidden, intermediate)}, to fit {name1} {tuple(w1.shape)}"
        wrong_shape(op, name2, w2, must)
    if rows > MAX_SIZE or hidden > MAX_SIZE:
        wrong_shape(op, name1, w1, f"at most {MAX_SIZE} in each dimension")
    return experts, intermediate


def check_shared(
    op: str,
    shared_w1: Tensor | QuantizedShape | None,
    shared_w2: Tensor | QuantizedShape | None,
    shared_weights: Tensor | None,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    gated: bool,
) -> int:
    """Checks shared experts and their weights; returns how many there are."""
    for name, given, other in (("shared_w1", shared_w1, "shared_w2"), ("shared_w2", shared_w2, "shared_w1")):
        if given is None:
            reason = other if shared_w1 is not shared_w2 else "shared_weights"
            wrong_type(op, name, None, f"a torch.Tensor where {reason} is given")
    shared, _ = _check_weight_pair(op, "shared_w1", shared_w1, "shared_w2", shared_w2, "N", "Is", dtype, hidden, gated)
    if shared_weights is not None:
        check_tensor(op, "shared_weights", shared_weights, FLOAT_DTYPES, 2, "[T, N]")
        if shared_weights.shape != (tokens, shared):
            wrong_shape(op, "shared_weights", shared_weights, f"[T, N] = {(tokens, shared)}")
    return shared


def _check_bias(op: str, name: str, bias: Tensor, dtype: torch.dtype, shape: tuple, layout: str) -> None:
    if not isinstance(bias, Tensor):
        wrong_type(op, name, f"of type {type(bias).__name__}", f"a torch.Tensor {layout} or None")
    if bias.dtype is not dtype:
        wrong_type(op, name, bias.dtype, f"{dtype}, the dtype of hidden_states")
    if bias.shape != shape:
        wrong_shape(op, name, bias, f"{layout} = {shape}")
    if not bias.is_contiguous():
        wrong_value(op, name, f"strided {bias.stride()}", "contiguous")


def check_assignments(op: str, topk_weights: Tensor, topk_ids: Tensor, tokens: int, experts: int) -> int:
    """Checks given routing weights and ids; returns top_k."""
    check_tensor(op, "topk_weights", topk_weights, FLOAT_DTYPES, 2, "[T, k]")
    check_tensor(op, "topk_ids", topk_ids, ID_DTYPES, 2, "[T, k]")
    shape = topk_ids.shape
    if shape[0] != tokens:
        wrong_shape(op, "topk_ids", topk_ids, f"[T, k] with T = {tokens} as in hidden_states")
    if topk_weights.shape != shape:
        wrong_shape(op, "topk_weights", topk_weights, f"[T, k] = {tuple(shape)}, the shape of topk_ids")
    top_k = shape[1]
    if not 1 <= top_k <= experts:
        wrong_shape(op, "topk_ids", topk_ids, f"[T, k] with k from 1 to the number of experts, {experts}")
    return top_k


def check_grouping(
    op: str, topk_ids: Tensor, num_experts: int, row_tile: int, shared_experts: int, capacity: int | None
) -> None:
    check_tensor(op, "topk_ids", topk_ids, ID_DTYPES, 2, "[T, k]")
    tokens, top_k = topk_ids.shape
    if top_k < 1:
        wrong_shape(op, "topk_ids", topk_ids, "[T, k] with k at least 1")
    check_int(op, "num_experts", num_experts, 1, MAX_EXPERTS)
    check_int(op, "shared_experts", shared_experts, 0, MAX_EXPERTS - num_experts, f" ({MAX_EXPERTS} experts in all)")
    check_int(op, "row_tile", row_tile, 1, MAX_ASSIGNMENTS)
    if capacity is not None:
        check_int(op, "capacity", capacity, 1, MAX_ASSIGNMENTS)
    if tokens * (top_k + shared_experts) > MAX_ASSIGNMENTS:
        wrong_shape(op, "topk_ids", topk_ids, f"at most {MAX_ASSIGNMENTS} assignments, T * (k + shared_experts)")


def check_gather(op: str, weights: Tensor, expert_ids: Tensor) -> None:
    if not isinstance(weights, Tensor):
        wrong_type(op, "weights", f"of type {type(weights).__name__}", "a torch.Tensor [E, ...]")
    if weights.layout is not torch.strided:
        wrong_value(op, "weights", f"a {weights.layout} tensor", "a dense (torch.strided) tensor")
    if weights.ndim < 1 or weights.shape[0] < 1:
        wrong_shape(op, "weights", weights, "[E, ...] with E at least 1")
    if not weights.is_contiguous():
        wrong_value(op, "weights", f"strided {weights.stride()}", "contiguous")
    check_tensor(op, "expert_ids", expert_ids, ID_DTYPES, 1, "[T]")


def check_bits(op: str, name: str, bits: object) -> None:
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int | float)):
        wrong_type(op, name, f"{bits!r} of type {type(bits).__name__}", "a number (bits of a weight) or None")
