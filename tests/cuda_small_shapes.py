"""Runs every kernel of the cuda engine once at a small, uneven shape: the program that compute-sanitizer checks.

    compute-sanitizer --tool memcheck python tests/cuda_small_shapes.py

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1 and METAL_MOE_CUDA_SEPARATE_SCRATCH=1 (tools/cuda_checks.sh does), so that every
tensor and every piece of scratch is an allocation whose bounds the tool knows. Ends with status 1 where a result is
wrong or a kernel of the table has not run.
"""

import sys

import metal_moe
import torch
from cases import DTYPES, FAMILIES, PRECISIONS, ROUNDING, assert_close, make_layer
from metal_moe import QuantizedExperts

ran: set[str] = set()


def run_layer(family: str, tokens: int, hidden: int, intermediate: int, dtype: str, acc: bool, **options) -> None:
    layer = make_layer(tokens, hidden, intermediate, 5, 2, DTYPES[dtype], use_fp32_acc=acc, shared=1, **options)
    out = layer.to(torch.device("cuda")).run(kernel=family)
    ran.update(metal_moe.last_dispatch()["kernels"])
    assert_close(out, layer.reference(), f"{layer} {family}")


def run_quantized(family: str, tokens: int, dtype: str, **options) -> None:
    """Gate and up of different bits, and blocks of another format after them."""
    layer = make_layer(tokens, 96, 32, 5, 2, DTYPES[dtype], routing="dropped", bias=True, **options)
    bits = 5 if options else {"gate": 6, "up": [2, 3, 4, 8, 4]}
    w1 = QuantizedExperts.quantize(layer.w1, format="affine", bits=bits, group_size=32)
    w2 = QuantizedExperts.quantize(layer.w2, format="mxfp4")
    layer.w1, layer.w2 = w1.dequantize(torch.float64), w2.dequantize(torch.float64)
    expected = layer.reference()
    on = layer.to(torch.device("cuda"))
    on.w1, on.w2 = w1.to("cuda"), w2.to("cuda")
    out = on.run(kernel=family)
    ran.update(metal_moe.last_dispatch()["kernels"])
    assert_close(out, expected, f"{layer} {family} quantized", ROUNDING[out.dtype])


def run_trellis() -> None:
    """Quantised and decoded on the GPU, then a layer of one token and of several."""
    weights = [torch.randn(2, rows, 128, device="cuda") / 16 for rows in (256, 128)]
    w1, w2 = (metal_moe.QuantizedExperts.quantize(w, format="trellis", bits=4) for w in weights)
    ran.update(metal_moe.last_dispatch()["kernels"])
    for experts in (w1, w2):
        assert experts.dequantize(torch.float32).isfinite().all()
        ran.update(metal_moe.last_dispatch()["kernels"])
    for tokens in (1, 5):
        x = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16)
        ids = torch.zeros(tokens, 1, device="cuda", dtype=torch.int32)
        metal_moe.fused_experts(x, w1, w2, torch.ones(tokens, 1, device="cuda"), ids)
        ran.update(metal_moe.last_dispatch()["kernels"])


def run_linear(dtype: torch.dtype) -> None:
    """Products of both layouts and sizes that end in the middle of tiles; LoRA with one adapter and with many."""
    options = {"device": "cuda", "dtype": dtype}
    for rows, depth, columns in ((3, 72, 67), (37, 40, 66), (5, 33, 7)):
        a = torch.randn(rows, depth, **options)
        for b in (torch.randn(depth, columns, **options), torch.randn(columns, depth, **options).T):
            for kernel in ("gemv", "tile"):
                out = metal_moe.matmul(a, b, kernel=kernel)
                assert_close(out, (a.double() @ b.double()).cpu().numpy(), f"matmul {kernel} {rows} {depth} {columns}")
                ran.update(metal_moe.last_dispatch()["kernels"])
    for tokens, inputs, outputs, rank in ((37, 72, 66, 12), (5, 35, 70, 7)):
        x, base = torch.randn(tokens, inputs, **options), torch.randn(tokens, outputs, **options)
        A, B = torch.randn(3, rank, inputs, **options), torch.randn(3, outputs, rank, **options)
        ids = torch.arange(tokens, device="cuda") // 2 % 5 - 1
        for kernel in ("gemv", "tile"):
            assert metal_moe.lora(x, A[1], B[1], 0.5, base, kernel=kernel).isfinite().all()
            ran.update(metal_moe.last_dispatch()["kernels"])
        assert metal_moe.lora(x, A, B, 0.5, base, adapter_ids=ids).isfinite().all()


def main() -> int:
    for family in FAMILIES:
        shapes = [(72, 40)] if family == "moe_simd" else [(72, 40), (67, 35)]
        # Rows per expert decide the row tile: 8 to 128 where a family has them; 9 tokens find theirs in the ids.
        tokens = {"moe_decode": [2], "moe_prefill4": [9, 17], "moe_base": [9, 17]}.get(family, [9, 20, 30, 70, 150])
        for dtype, acc in PRECISIONS:
            for hidden, intermediate in shapes:
                for count in tokens:
                    run_layer(family, count, hidden, intermediate, dtype, acc, bias=True, routing="dropped")
                    run_layer(family, count, hidden, intermediate, dtype, acc, activation="relu2")
        for dtype in DTYPES if family != "moe_simd" else ():
            for count in tokens:
                run_quantized(family, count, dtype)
                run_quantized(family, count, dtype, activation="relu2")
    run_trellis()
    for dtype in DTYPES.values():
        run_linear(dtype)
    logits = torch.randn(37, 70, device="cuda")
    for scoring in ("softmax", "sigmoid", "sqrt_softplus", "topk_softmax"):
        _, ids = metal_moe.fused_topk(logits, 6, scoring=scoring, num_expert_group=7, topk_group=3)
        ran.update(metal_moe.last_dispatch()["kernels"])
    metal_moe.group_tokens(ids, 70)
    metal_moe.group_tokens(ids, 70, capacity=5)
    ran.update(metal_moe.last_dispatch()["kernels"])
    weights = torch.randn(70, 33, device="cuda", dtype=torch.float16)
    assert torch.equal(metal_moe.gather_experts(weights, ids[:, 0]), weights[ids[:, 0].long()])
    ran.update(metal_moe.last_dispatch()["kernels"])
    torch.cuda.synchronize()
    missing = sorted({kernel["name"] for kernel in metal_moe.kernels("cuda")} - ran)
    print(f"{len(ran)} kernels ran" + (f"; not {missing}" if missing else ""))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
