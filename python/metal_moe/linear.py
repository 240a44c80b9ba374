"""Small matrix products, where launching weighs more than arithmetic, and LoRA."""

import torch
from torch import Tensor

from . import _core
from ._operator import engine_of, operator
from ._validate import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_devices,
    check_number,
    check_rows,
    check_tensor,
    choices,
    wrong_shape,
    wrong_type,
    wrong_value,
)
from .tuning import matmul_limit

__all__ = ["lora", "matmul"]

# Families by name. matmul also takes PyTorch's product, and either of ours.
KERNELS = ("gemv", "tile")
OURS = "metal_moe"
TORCH = "torch"
# kernels/linear/lora.h
MAX_RANK = 256


def _check_kernel(op: str, kernel: str | None, known: tuple[str, ...]) -> None:
    if kernel is None or kernel in known:
        return
    if not isinstance(kernel, str):
        wrong_type(op, "kernel", f"{kernel!r} of type {type(kernel).__name__}", "a str or None")
    wrong_value(op, "kernel", f'"{kernel}"', f"{choices(known)} or None")


def _check_operand(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        wrong_type("matmul", name, f"of type {type(value).__name__}", "a torch.Tensor")
    if value.dtype not in FLOAT_DTYPES:
        wrong_type("matmul", name, value.dtype, choices(FLOAT_DTYPES))
    if value.layout is not torch.strided:
        wrong_value("matmul", name, f"a {value.layout} tensor", "a dense (torch.strided) tensor")
    if value.ndim < 1:
        wrong_shape("matmul", name, value, "of at least 1 dimension")


def _check_matmul(a: Tensor, b: Tensor) -> None:
    _check_operand("a", a)
    _check_operand("b", b)
    if b.dtype is not a.dtype:
        wrong_type("matmul", "b", b.dtype, f"{a.dtype}, the dtype of a")
    check_devices("matmul", ("a", "b"), (a, b))
    if a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        layout = "[..., K, N]" if b.ndim > 1 else "[K]"
        wrong_shape("matmul", "b", b, f"{layout} with K = {a.shape[-1]}, the last dimension of a")
    if a.ndim > 2 and b.ndim > 2:
        for theirs, ours in zip(reversed(b.shape[:-2]), reversed(a.shape[:-2]), strict=False):
            if theirs != ours and theirs != 1 and ours != 1:
                wrong_shape("matmul", "b", b, f"of leading dimensions that broadcast with those of a, {tuple(a.shape)}")


def _save_matmul(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    rows = a.unsqueeze(0) if a.ndim == 1 else a
    columns = b.unsqueeze(1) if b.ndim == 1 else b
    if b.ndim == 1:
        grad = grad.unsqueeze(-1)
    if a.ndim == 1:
        grad = grad.unsqueeze(-2)
    grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_a = (grad @ columns.mT).sum_to_size(rows.shape).reshape(a.shape)
    if ctx.needs_input_grad[1]:
        grad_b = (rows.mT @ grad).sum_to_size(columns.shape).reshape(b.shape)
    return grad_a, grad_b


@operator(autograd=(_save_matmul, _matmul_backward))
def matmul(a: Tensor, b: Tensor, *, kernel: str | None = None) -> Tensor:
    """The matrix product `a @ b`: our kernel where it is small, PyTorch's where it is large.

    Small products take longer to launch than to compute; our kernels have one dispatch and no set-up. Up to how many
    multiply-adds they run is measured by `metal-moe tune`; until then it is a default of the device. They take matrices
    as they lie: [M, K] and [B, M, K] by [K, N] and [B, K, N] (B the same, or 1) with contiguous rows and any stride
    between them, and `b` with contiguous columns as well, such as `weight.T`. All other layouts, dimensions and empty
    products are PyTorch's. Sums are in float32; equal inputs give bitwise equal results on every call.

    Differentiable, with PyTorch's products in the backward pass.

    Args:
        a: [..., M, K] or [K], float32, float16 or bfloat16.
        b: [..., K, N] or [K], dtype of `a`. Leading dimensions broadcast as in `torch.matmul`.
        kernel: force a kernel: "gemv" (dot products), "tile" (simdgroup matrices), "metal_moe" (one of the two, by the
            number of rows and the device) or "torch". None: by size and device.

    Returns:
        [..., M, N], as `torch.matmul` shapes it, dtype of `a`, a new contiguous tensor. `last_dispatch()` gives as
        family which of the three ran.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that do not fit, different or unsupported devices, or a kernel of ours by name on matrices
            that none takes.
        RuntimeError: a kernel failed.

    Example:
        >>> metal_moe.matmul(torch.randn(64, 256), torch.randn(32, 256).T).shape
        torch.Size([64, 32])
    """
    _check_matmul(a, b)
    if kernel is not None:
        _check_kernel("matmul", kernel, (*KERNELS, OURS, TORCH))
    engine = engine_of(a)
    if engine is None:
        return torch.matmul(a, b)
    if kernel != TORCH and 2 <= a.ndim <= 3 and 2 <= b.ndim <= 3:
        rows, depth, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        shape = (rows, columns)
        products = rows * depth * columns
        if a.ndim == 3 or b.ndim == 3:
            batch = max(a.shape[0] if a.ndim == 3 else 1, b.shape[0] if b.ndim == 3 else 1)
            shape = (batch, rows, columns)
            products *= 0 if 0 in (*a.shape, *b.shape) else batch
        if products and (kernel is not None or products <= matmul_limit(engine, a.dtype)):
            out = a.new_empty(shape)
            if _core.matmul(engine, a, b, out, None if kernel == OURS else kernel):
                return out
            if kernel is not None:
                must = f"of rows that are contiguous (or columns, of b) with kernel {kernel}"
                wrong_value("matmul", "a or b", f"strided {a.stride()} and {b.stride()}", must)
    elif kernel is not None and kernel != TORCH:
        wrong_shape("matmul", "a", a, f"of 2 or 3 dimensions, as b {tuple(b.shape)} must be, with kernel {kernel}")
    _core.matmul_by_torch(engine)
    return torch.matmul(a, b)


def _check_lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    base: Tensor | None,
    adapter_ids: Tensor | None,
    scales: Tensor | None,
) -> None:
    op = "lora"
    if not isinstance(x, Tensor) or x.ndim < 2:
        check_tensor(op, "x", x, FLOAT_DTYPES, 2, "[..., inputs]")
    check_tensor(op, "x", x, FLOAT_DTYPES, x.ndim, "[..., inputs]")
    stacked = adapter_ids is not None
    ndim, layout_a, layout_b = (
        (3, "[L, r, inputs]", "[L, outputs, r]") if stacked else (2, "[r, inputs]", "[outputs, r]")
    )
    for name, value, layout in (("A", A, layout_a), ("B", B, layout_b)):
        check_tensor(op, name, value, FLOAT_DTYPES, ndim, layout)
        if value.dtype is not x.dtype:
            wrong_type(op, name, value.dtype, f"{x.dtype}, the dtype of x")
        if value.stride(-1) != 1 and value.shape[-1] != 1:
            wrong_value(op, name, f"strided {value.stride()}", "contiguous in its last dimension (stride 1)")
    rank = A.shape[-2]
    if not 1 <= rank <= MAX_RANK or A.shape[-1] != x.shape[-1] or A.shape[-1] < 1 or A.shape[0] < 1:
        wrong_shape(
            op, "A", A, f"{layout_a} with inputs = {x.shape[-1]} as in x, at least 1, and r from 1 to {MAX_RANK}"
        )
    if B.shape[-1] != rank or B.shape[-2] < 1 or (stacked and B.shape[0] != A.shape[0]):
        wrong_shape(op, "B", B, f"{layout_b} with {f'L = {A.shape[0]}, ' if stacked else ''}r = {rank} as in A")
    shape = x.shape[:-1]
    if base is not None:
        check_tensor(op, "base", base, FLOAT_DTYPES, x.ndim, "[..., outputs]")
        if base.dtype is not x.dtype:
            wrong_type(op, "base", base.dtype, f"{x.dtype}, the dtype of x")
        if base.shape != (*shape, B.shape[-2]):
            wrong_shape(op, "base", base, f"{(*shape, B.shape[-2])}, to fit x and B")
    if stacked:
        check_tensor(op, "adapter_ids", adapter_ids, ID_DTYPES, x.ndim - 1, "[...]")
        if adapter_ids.shape != shape:
            wrong_shape(op, "adapter_ids", adapter_ids, f"{tuple(shape)}, one for each row of x")
    if scales is not None:
        check_tensor(op, "scale", scales, (torch.float32,), 1, "[L]")
        adapters = A.shape[0] if stacked else 1
        if scales.shape != (adapters,) or not scales.is_contiguous():
            wrong_shape(op, "scale", scales, f"[L] = ({adapters},), contiguous")
    check_number(op, "scale", scale)
    names = ("x", "A", "B", "base", "adapter_ids", "scale")
    check_devices(op, names, (x, A, B, base, adapter_ids, scales))


def _as_matrix(name: str, value: Tensor | None) -> Tensor | None:
    """[..., n] as [T, n], where it lies."""
    if value is None:
        return None
    if value.ndim > 2:
        try:
            value = value.view(-1, value.shape[-1])
        except RuntimeError:
            must = "of leading dimensions that can be seen as one without a copy"
            wrong_value("lora", name, f"strided {value.stride()}", must)
    check_rows("lora", name, value)
    return value


def _save_lora(ctx, inputs, keyword_only_inputs, output) -> None:
    x, A, B, scale, _, adapter_ids, scales = inputs
    ctx.scale = scale
    ctx.save_for_backward(x, A, B, adapter_ids, scales)


def _lora_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, A, B, adapter_ids, scales = ctx.saved_tensors
    needs = ctx.needs_input_grad
    tokens = x.reshape(-1, x.shape[-1])
    rows = grad.reshape(-1, grad.shape[-1])
    adapters = [(A, B)] if adapter_ids is None else list(zip(A.unbind(), B.unbind(), strict=True))
    grad_x = torch.zeros_like(tokens) if needs[0] else None
    grads_a, grads_b, grads_scale = [], [], []
    for index, (a, b) in enumerate(adapters):
        own = rows
        if adapter_ids is not None:  # the ids stay on the device
            own = torch.where(adapter_ids.reshape(-1, 1) == index, rows, rows.new_zeros(()))
        scale = ctx.scale if scales is None else scales[index]
        scaled = (own * scale).to(x.dtype)
        grad_s = scaled @ b
        if grad_x is not None:
            grad_x = grad_x + grad_s @ a
        if needs[1]:
            grads_a.append(grad_s.mT @ tokens)
        if needs[2]:
            grads_b.append(scaled.mT @ (tokens @ a.mT))
        if scales is not None and needs[6]:
            grads_scale.append((own.float() * ((tokens @ a.mT) @ b.mT)).sum())

    def together(grads: list[Tensor], shape: torch.Size) -> Tensor | None:
        return torch.stack(grads).reshape(shape) if grads else None

    return (
        None if grad_x is None else grad_x.reshape(x.shape),
        together(grads_a, A.shape),
        together(grads_b, B.shape),
        None,
        grad if needs[4] else None,
        None,
        None if scales is None else together(grads_scale, scales.shape),
    )


# The operator has the name of the public function, which takes one scale or one for each adapter.
@operator(name="lora", autograd=(_save_lora, _lora_backward))
def _lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    base: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    kernel: str | None = None,
) -> Tensor:
    _check_lora(x, A, B, scale, base, adapter_ids, scales)
    if kernel is not None:
        _check_kernel("lora", kernel, KERNELS)
        if kernel == "tile" and adapter_ids is not None:
            wrong_value("lora", "kernel", '"tile"', '"gemv" or None where adapter_ids are given')
    tokens, added = _as_matrix("x", x), _as_matrix("base", base)
    ids = None
    if adapter_ids is not None and adapter_ids.ndim != 1:
        _core.settle_batch()  # PyTorch may copy them now
        ids = adapter_ids.reshape(-1)
    out = x.new_empty((*x.shape[:-1], B.shape[-2]))
    engine = engine_of(out)
    if engine is not None:
        _core.lora(
            engine,
            tokens,
            A,
            B,
            scale,
            added,
            adapter_ids if ids is None else ids,
            scales,
            out if out.ndim == 2 else out.view(-1, out.shape[-1]),
            kernel,
        )
    return out


def lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    base: Tensor | None = None,
    *,
    adapter_ids: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """A low-rank addition to a linear layer: base + scale * (x A^T) B^T, in two dispatches of one encoder.

    With `adapter_ids` each row of x has an adapter of its own, one of L that are stacked in `A` and `B`: adapters of
    different ranks are filled up with zeros. What is between the two products stays in float32, as do all sums; a row's
    result does not depend on the other rows where `kernel` is the same. Bitwise the same on every call.

    Differentiable in x, A, B, base and a `scale` tensor, with PyTorch's products in the backward pass.

    Args:
        x: [..., inputs] of at least 2 dimensions, float32, float16 or bfloat16; rows contiguous, any row stride.
        A: [r, inputs], with `adapter_ids` [L, r, inputs], dtype of `x`; rows contiguous. r from 1 to 256.
        B: [outputs, r], with `adapter_ids` [L, outputs, r], dtype of `x`; rows contiguous.
        scale: a number, or one for each adapter: [L] float32 (without `adapter_ids` [1]).
        base: [..., outputs], dtype of `x`; rows contiguous, any row stride: what the layer itself computed. None: 0.
        adapter_ids: [...] int32 or int64, any stride. A row whose id is outside 0..L-1 has no adapter: it is its base.
        kernel: force a kernel: "gemv" (dot products) or "tile" (simdgroup matrices, one adapter only). None: by the
            number of rows and the device.

    Returns:
        [..., outputs], dtype of `x`, a new contiguous tensor.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a shape, layout, device or value outside what is stated above; the message names the argument.
        RuntimeError: a kernel failed.

    Example:
        >>> x, base = torch.randn(3, 256), torch.randn(3, 512)
        >>> A, B = torch.randn(8, 16, 256), torch.randn(8, 512, 16)
        >>> metal_moe.lora(x, A, B, 0.5, base, adapter_ids=torch.tensor([7, -1, 0])).shape
        torch.Size([3, 512])
    """
    if isinstance(scale, Tensor):
        return _lora(x, A, B, 1.0, base, adapter_ids, scale, kernel=kernel)
    return _lora(x, A, B, scale, base, adapter_ids, None, kernel=kernel)
