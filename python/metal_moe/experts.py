"""The experts of an MoE layer: on given routes, with routing in the same command buffer, and gathered."""

import torch
from torch import Tensor

from . import _core
from ._known_calls import remembers_calls
from ._operator import engine_of, operator
from ._quantized import accepts_quantized
from ._validate import (
    QuantizedShape,
    check_assignments,
    check_devices,
    check_experts,
    check_gather,
    check_routing,
    wrong_shape,
)
from .formats.layout import round_up

# Tensor arguments, as `check_devices` names them.
_EXPERTS_TENSORS = (
    "hidden_states",
    "w1",
    "w2",
    "topk_weights",
    "topk_ids",
    "w1_bias",
    "w2_bias",
    "shared_w1",
    "shared_w2",
    "shared_weights",
)
_MOE_TENSORS = (
    "hidden_states",
    "w1",
    "w2",
    "router_logits",
    "correction_bias",
    "w1_bias",
    "w2_bias",
    "shared_w1",
    "shared_w2",
    "shared_weights",
)


def _given(weights: list[Tensor], shape: list[int]) -> Tensor | QuantizedShape | None:
    if not weights:
        return None
    return weights[0] if len(weights) == 1 else QuantizedShape(shape)


def _check_buffers(op: str, hidden_states: Tensor, weights: dict[str, list[Tensor]], others: dict) -> None:
    named = [("hidden_states", hidden_states)]
    named += [(name, tensor) for name, buffers in weights.items() for tensor in buffers]
    names, tensors = zip(*named, *others.items(), strict=True)
    check_devices(op, names, tensors)


def _aligned(hidden_states: Tensor) -> Tensor:
    """Rows at multiples of 16 bytes, as kernels of quantised weights read them; a copy where they are not."""
    row_bytes = hidden_states.stride(0) * hidden_states.element_size()
    if hidden_states.data_ptr() % 16 == 0 and (hidden_states.shape[0] <= 1 or row_bytes % 16 == 0):
        return hidden_states
    _core.count_fallback("copied_input", copies=True)
    _core.settle_batch()  # PyTorch reads it now
    tokens, hidden = hidden_states.shape
    unit = 16 // hidden_states.element_size()
    return hidden_states.new_empty(tokens, round_up(hidden, unit))[:, :hidden].copy_(hidden_states)


@operator
def fused_experts_quantized(
    hidden_states: Tensor,
    w1: list[Tensor],
    w1_shape: list[int],
    w2: list[Tensor],
    w2_shape: list[int],
    shared_w1: list[Tensor],
    shared_w1_shape: list[int],
    shared_w2: list[Tensor],
    shared_w2_shape: list[int],
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    shared_weights: Tensor | None = None,
    use_fp32_acc: bool = True,
    kernel: str | None = None,
    trellis_w1: bool = False,
    trellis_w2: bool = False,
    codes: list[int] | None = None,
) -> Tensor:
    """`fused_experts` with the buffers of quantised weights: what it calls for `QuantizedExperts`.

    `w1` and `w2` are the one dense tensor, or codes, scales, biases and table of a part, of gate and then of up for w1.
    So are `shared_w1` and `shared_w2`: each as w1 or w2 is, or empty. `trellis_w1`, `trellis_w2`: its
    weights are trellis codes; then there are no shared experts.
    `codes`: how all experts of gate, up and down are stored, shared ones too; numbers of `_core.matrix_code`, or 0.
    """
    op = "fused_experts"
    top_k = topk_ids.shape[1] if isinstance(topk_ids, Tensor) and topk_ids.ndim == 2 else 1
    first, second = _given(w1, w1_shape), _given(w2, w2_shape)
    activation_number = check_experts(
        op,
        hidden_states,
        first,
        second,
        top_k,
        activation,
        w1_bias,
        w2_bias,
        interleaved,
        alpha,
        limit,
        _given(shared_w1, shared_w1_shape),
        _given(shared_w2, shared_w2_shape),
        shared_weights,
        use_fp32_acc,
        kernel,
    )
    check_assignments(op, topk_weights, topk_ids, hidden_states.shape[0], w1_shape[0])
    weights = {"w1": w1, "w2": w2, "shared_w1": shared_w1, "shared_w2": shared_w2}
    others = {"topk_weights": topk_weights, "topk_ids": topk_ids, "w1_bias": w1_bias, "w2_bias": w2_bias}
    _check_buffers(op, hidden_states, weights, {**others, "shared_weights": shared_weights})
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    engine = engine_of(out)
    if engine is not None:
        _core.fused_experts(
            engine,
            _aligned(hidden_states),
            w1,
            w2,
            topk_weights,
            topk_ids,
            out,
            w1_bias,
            w2_bias,
            shared_w1 or None,
            shared_w2 or None,
            shared_weights,
            activation_number,
            interleaved,
            alpha,
            limit,
            use_fp32_acc,
            kernel,
            w2_shape[2],
            trellis_w1,
            trellis_w2,
            codes,
            shared_w2_shape[2] if shared_w2 else 0,
        )
    return out


@operator
def fused_moe_quantized(
    hidden_states: Tensor,
    w1: list[Tensor],
    w1_shape: list[int],
    w2: list[Tensor],
    w2_shape: list[int],
    shared_w1: list[Tensor],
    shared_w1_shape: list[int],
    shared_w2: list[Tensor],
    shared_w2_shape: list[int],
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    renormalize: bool = True,
    renormalize_epsilon: float | None = None,
    routed_scaling_factor: float = 1.0,
    activation: str = "silu",
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    shared_weights: Tensor | None = None,
    use_fp32_acc: bool = True,
    kernel: str | None = None,
    trellis_w1: bool = False,
    trellis_w2: bool = False,
    codes: list[int] | None = None,
) -> Tensor:
    """`fused_moe` with the buffers of quantised weights, as `fused_experts_quantized` takes them."""
    op = "fused_moe"
    routing = check_routing(
        op,
        router_logits,
        top_k,
        scoring,
        correction_bias,
        num_expert_group,
        topk_group,
        group_score,
        renormalize,
        renormalize_epsilon,
        routed_scaling_factor,
    )
    activation_number = check_experts(
        op,
        hidden_states,
        _given(w1, w1_shape),
        _given(w2, w2_shape),
        top_k,
        activation,
        w1_bias,
        w2_bias,
        interleaved,
        alpha,
        limit,
        _given(shared_w1, shared_w1_shape),
        _given(shared_w2, shared_w2_shape),
        shared_weights,
        use_fp32_acc,
        kernel,
    )
    if router_logits.shape != (hidden_states.shape[0], w1_shape[0]):
        must = f"[T, E] = {(hidden_states.shape[0], w1_shape[0])}, to fit hidden_states and w1"
        wrong_shape(op, "router_logits", router_logits, must)
    weights = {"w1": w1, "w2": w2, "shared_w1": shared_w1, "shared_w2": shared_w2}
    others = {
        "router_logits": router_logits,
        "correction_bias": correction_bias,
        "w1_bias": w1_bias,
        "w2_bias": w2_bias,
        "shared_weights": shared_weights,
    }
    _check_buffers(op, hidden_states, weights, others)
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    engine = engine_of(out)
    if engine is not None:
        _core.fused_moe(
            engine,
            _aligned(hidden_states),
            w1,
            w2,
            router_logits,
            correction_bias,
            out,
            top_k,
            *routing,
            w1_bias,
            w2_bias,
            shared_w1 or None,
            shared_w2 or None,
            shared_weights,
            activation_number,
            interleaved,
            alpha,
            limit,
            use_fp32_acc,
            kernel,
            w2_shape[2],
            trellis_w1,
            trellis_w2,
            codes,
            shared_w2_shape[2] if shared_w2 else 0,
        )
    return out


@remembers_calls
@accepts_quantized(fused_experts_quantized)
@operator
def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_weights: Tensor | None = None,
    use_fp32_acc: bool = True,
    kernel: str | None = None,
) -> Tensor:
    """Runs every token through its experts and adds up their weighted results.

    out[t] = sum over slots j of topk_weights[t, j] * down(act(gate(x[t])) * up(x[t])), expert topk_ids[t, j], in order,
    then the shared experts. One token takes two dispatches, more take at most four. Equal inputs give bitwise equal
    results on every call. T may be 0; H and I may be any size.

    Args:
        hidden_states: [T, H] float32, float16 or bfloat16; rows contiguous, any row stride.
        w1: [E, 2I, H], contiguous, dtype of `hidden_states`: per expert I gate rows, then I up rows.
            With activation "relu2", which has no gate: [E, I, H].
            Or `QuantizedExperts` of that shape, also of gate and up apart; a bias of its own is added.
        w2: [E, H, I], contiguous, dtype of `hidden_states`. Or `QuantizedExperts` of that shape. Of w1 and of w2 all
            experts are trellis codes, or none is.
        topk_weights: [T, k] float32, float16 or bfloat16, any strides.
        topk_ids: [T, k] int32 or int64, any strides. k from 1 to E. An id outside 0..E-1 (an expert that lives on
            another machine) contributes nothing.
        activation: "silu"; "gelu" (erf); "gelu_tanh"; "relu2": max(up, 0) squared; "swiglu_clamp" (gpt-oss):
            g = min(gate, limit), u = clamp(up, -limit, limit), g * sigmoid(alpha * g) * (u + 1).
        w1_bias: [E, 2I] ("relu2": [E, I]), contiguous, dtype of `hidden_states`, rows ordered as those of `w1`.
        w2_bias: [E, H], contiguous, dtype of `hidden_states`.
        interleaved: rows of `w1` and `w1_bias` are gate 0, up 0, gate 1, up 1, ... (gpt-oss).
        alpha: of "swiglu_clamp".
        limit: of "swiglu_clamp", above 0; math.inf: no clamp.
        shared_w1: [N, 2Is, H] ("relu2": [N, Is, H]), contiguous: N shared experts, which every token uses. Or
            `QuantizedExperts` of that shape, without a bias. Where any weights are trellis, shared experts run after
            the routed ones, and the two results, rounded to the dtype of `hidden_states`, are added up.
        shared_w2: [N, H, Is], contiguous; given together with `shared_w1`. Or `QuantizedExperts`, as for `shared_w1`.
        shared_weights: [T, N] float32, float16 or bfloat16, any strides: weights of the shared experts; None: 1.
        use_fp32_acc: accumulate in float32. False, where dtype is float16: sums of up to 16 products are kept in
            float16 and added up in float32, which doubles or triples the error. bfloat16 and float32 always accumulate
            in float32, as do layers with quantised weights.
        kernel: force a kernel family, one of "moe_decode", "moe_prefill4", "moe_base", "moe_large_batch", "moe_simd",
            also with the "_fp32acc" that `select_moe_kernel` appends. None: by T and device. With quantised weights
            also the layer's own names, those of `last_dispatch()`, specialization, with or without bits and "_fp32acc":
            "moe_trellis_swiglu_decode_6_2_3" runs trellis weights of 6, 2 and 3 bits, and is refused for any others.

    Returns:
        [T, H], dtype of `hidden_states`, a new contiguous tensor. `last_dispatch()` says which kernels ran.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a shape, layout, device or value outside what is stated above; the message names the argument.
            E + N is limited to 1024, T * (k + N) to 2**22.
        RuntimeError: gradients were asked for, or a kernel failed.

    Example:
        >>> x, w1, w2 = torch.randn(2, 64), torch.randn(8, 96, 64), torch.randn(8, 64, 48)
        >>> weights, ids = metal_moe.fused_topk(torch.randn(2, 8), 2)
        >>> metal_moe.fused_experts(x, w1, w2, weights, ids).shape
        torch.Size([2, 64])
    """
    op = "fused_experts"
    # Shapes of the routes are checked after those of the experts; until then anything with two dimensions is taken.
    top_k = topk_ids.shape[1] if isinstance(topk_ids, Tensor) and topk_ids.ndim == 2 else 1
    activation_number = check_experts(
        op,
        hidden_states,
        w1,
        w2,
        top_k,
        activation,
        w1_bias,
        w2_bias,
        interleaved,
        alpha,
        limit,
        shared_w1,
        shared_w2,
        shared_weights,
        use_fp32_acc,
        kernel,
    )
    check_assignments(op, topk_weights, topk_ids, hidden_states.shape[0], w1.shape[0])
    check_devices(
        op,
        _EXPERTS_TENSORS,
        (hidden_states, w1, w2, topk_weights, topk_ids, w1_bias, w2_bias, shared_w1, shared_w2, shared_weights),
    )
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    engine = engine_of(out)
    if engine is not None:
        _core.fused_experts(
            engine,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            out,
            w1_bias,
            w2_bias,
            shared_w1,
            shared_w2,
            shared_weights,
            activation_number,
            interleaved,
            alpha,
            limit,
            use_fp32_acc,
            kernel,
        )
    return out


@remembers_calls
@accepts_quantized(fused_moe_quantized)
@operator
def fused_moe(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    renormalize: bool = True,
    renormalize_epsilon: float | None = None,
    routed_scaling_factor: float = 1.0,
    activation: str = "silu",
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_weights: Tensor | None = None,
    use_fp32_acc: bool = True,
    kernel: str | None = None,
) -> Tensor:
    """Runs a whole MoE layer after the router's matrix product: routing and experts in one command buffer.

    The same as `fused_topk` followed by `fused_experts`, without a host round trip between them: three dispatches for
    one token, at most five for more.

    Args:
        hidden_states: [T, H] float32, float16 or bfloat16; rows contiguous, any row stride.
        w1: [E, 2I, H] (activation "relu2": [E, I, H]), contiguous, dtype of `hidden_states`; or `QuantizedExperts`.
        w2: [E, H, I], contiguous, dtype of `hidden_states`; or `QuantizedExperts`.
        router_logits: [T, E] float32, float16 or bfloat16, any strides.
        top_k: experts per token, from 1 to min(E, 16).
        scoring, correction_bias, num_expert_group, topk_group, group_score, renormalize, renormalize_epsilon,
            routed_scaling_factor: how experts are chosen and weighted, as in `fused_topk`.
        activation, w1_bias, w2_bias, interleaved, alpha, limit, shared_w1, shared_w2, shared_weights, use_fp32_acc,
            kernel: how experts are computed, as in `fused_experts`.

    Returns:
        [T, H], dtype of `hidden_states`, a new contiguous tensor. `last_dispatch()` says which kernels ran.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_topk` and `fused_experts`.

    Example:
        >>> x, w1, w2 = torch.randn(2, 64), torch.randn(8, 96, 64), torch.randn(8, 64, 48)
        >>> metal_moe.fused_moe(x, w1, w2, torch.randn(2, 8), top_k=2).shape
        torch.Size([2, 64])
    """
    op = "fused_moe"
    routing = check_routing(
        op,
        router_logits,
        top_k,
        scoring,
        correction_bias,
        num_expert_group,
        topk_group,
        group_score,
        renormalize,
        renormalize_epsilon,
        routed_scaling_factor,
    )
    activation_number = check_experts(
        op,
        hidden_states,
        w1,
        w2,
        top_k,
        activation,
        w1_bias,
        w2_bias,
        interleaved,
        alpha,
        limit,
        shared_w1,
        shared_w2,
        shared_weights,
        use_fp32_acc,
        kernel,
    )
    if router_logits.shape != (hidden_states.shape[0], w1.shape[0]):
        must = f"[T, E] = {(hidden_states.shape[0], w1.shape[0])}, to fit hidden_states and w1"
        wrong_shape(op, "router_logits", router_logits, must)
    check_devices(
        op,
        _MOE_TENSORS,
        (hidden_states, w1, w2, router_logits, correction_bias, w1_bias, w2_bias, shared_w1, shared_w2, shared_weights),
    )
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    engine = engine_of(out)
    if engine is not None:
        _core.fused_moe(
            engine,
            hidden_states,
            w1,
            w2,
            router_logits,
            correction_bias,
            out,
            top_k,
            *routing,
            w1_bias,
            w2_bias,
            shared_w1,
            shared_w2,
            shared_weights,
            activation_number,
            interleaved,
            alpha,
            limit,
            use_fp32_acc,
            kernel,
        )
    return out


@operator
def gather_experts(weights: Tensor, expert_ids: Tensor) -> Tensor:
    """Copies the weights of the chosen experts, `weights[expert_ids]`, in one dispatch and without a host read.

    `fused_experts` needs no such copy; this is for code that multiplies gathered weights itself.

    Args:
        weights: [E, ...] of any dtype, contiguous.
        expert_ids: [T] int32 or int64, any stride. An id outside 0..E-1 gives zeros.

    Returns:
        [T, ...], dtype of `weights`, a new contiguous tensor.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: `weights` without experts or not contiguous, a wrong number of dimensions, an unsupported device.
        RuntimeError: gradients were asked for, or a kernel failed.

    Example:
        >>> metal_moe.gather_experts(torch.randn(8, 64, 48), torch.tensor([3, 0, 3])).shape
        torch.Size([3, 64, 48])
    """
    check_gather("gather_experts", weights, expert_ids)
    check_devices("gather_experts", ("weights", "expert_ids"), (weights, expert_ids))
    out = weights.new_empty((expert_ids.shape[0], *weights.shape[1:]))
    engine = engine_of(out)
    if engine is not None:
        rows = weights.flatten(1) if weights.ndim > 2 else weights
        _core.gather_experts(engine, rows, expert_ids, out.flatten(1) if out.ndim > 2 else out)
    return out
