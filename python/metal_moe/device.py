"""What runs and what ran: devices, compiled kernels, kernel selection, the last dispatch, scratch memory, threads."""

import torch

from . import _core
from ._operator import engine_of_device
from ._validate import DEFAULT_DEVICE, MAX_SIZE, SUPPORTED_DEVICES, check_bits, check_bool, check_int, choices

__all__ = [
    "SUPPORTED_DEVICES",
    "counters",
    "device_info",
    "get_num_threads",
    "kernels",
    "last_dispatch",
    "pool_stats",
    "pool_trim",
    "reset_counters",
    "select_moe_kernel",
    "set_exact_seed",
    "set_num_threads",
    "set_specialization",
]


def select_moe_kernel(
    batch_size: int,
    use_fp32_acc: bool,
    gate_bits: float | None = None,
    up_bits: float | None = None,
    down_bits: float | None = None,
    *,
    device: str | torch.device | None = None,
) -> tuple[str, int]:
    """The kernel family for a batch, and how many output columns a tile of it has: one threadgroup computes a tile, or
    several share it (moe_decode, moe_prefill4).

    It follows what `metal-moe tune` measured on the device for weights of these bits, and where nothing was measured
    the table below, of Apple GPUs. A layer whose own shape was measured, and devices with defaults of their own, may
    change families at other batch sizes; `last_dispatch()` says which one ran.

    | tokens | family | quantised | tile_n |
    | --- | --- | --- | --- |
    | 0, 1 | moe_decode | moe_trellis_swiglu_decode_6_2_3 | 64 |
    | 2 to 16 | moe_prefill4 | moe_trellis_swiglu_prefill4 | 64 |
    | 17 to 32 | moe_base | moe_trellis_swiglu | 64 |
    | 33 and more | moe_large_batch | moe_trellis_swiglu_large_batch | 128 |

    Quantised weights have the names of kernels for trellis weights of these bits in gate, up and down, of which all
    combinations exist; without one of the three bits the name of decode has none. In decode they have one accumulation,
    in float32; with `use_fp32_acc` large batches are those of 17 to 32 tokens.

    Args:
        batch_size: tokens.
        use_fp32_acc: accumulate in float32; appends "_fp32acc" to the name.
        gate_bits, up_bits, down_bits: bits of a weight; 1 to 8, also n + 1/2, where it is quantised, 16, 32 or None
            where dense.
        device: a device of PyTorch. None: the default one.

    Returns:
        (name, tile_n). The name can be passed as `kernel=` to `fused_experts` and `fused_moe`; that of quantised
        weights with a layer of just these. What ran stands in `last_dispatch()`, specialization, with format and
        activation of the layer.

    Raises:
        TypeError: a wrong type. ValueError: batch_size below 0, or bits that no format has.

    Example:
        >>> metal_moe.select_moe_kernel(8, True)
        ('moe_prefill4_fp32acc', 64)
        >>> metal_moe.select_moe_kernel(1, False, 6, 2, 3)
        ('moe_trellis_swiglu_decode_6_2_3', 64)
    """
    op = "select_moe_kernel"
    check_int(op, "batch_size", batch_size, 0, MAX_SIZE)
    check_bool(op, "use_fp32_acc", use_fp32_acc)
    for name, bits in (("gate_bits", gate_bits), ("up_bits", up_bits), ("down_bits", down_bits)):
        check_bits(op, name, bits)
    engine = _engine(op, DEFAULT_DEVICE if device is None else device)
    return _core.select_moe_kernel(batch_size, use_fp32_acc, gate_bits, up_bits, down_bits, engine)


def kernels(device: str | torch.device = DEFAULT_DEVICE) -> list[dict]:
    """Every kernel that exists for `device` (on CUDA devices compiled when first used, and kept on disk).

    Returns:
        One dict per kernel: name, family, stage ("gate_up", "down", "route", ...), format ("dense"), dtype,
        accumulation ("fp32", "fp16"), row_tile and tile_n; what a kernel does not have is "" or 0. coded_matrices says
        for how many matrices the kernel is compiled again where their experts are stored alike (`last_dispatch()`,
        specialization).

    Raises:
        ValueError: an unsupported device. RuntimeError: the kernel library cannot be loaded.
    """
    return _core.kernels(_engine("kernels", device))


def device_info(device: str | torch.device = DEFAULT_DEVICE) -> dict:
    """The engine that serves `device`.

    Returns:
        device, engine, name (with the processor level its kernels are compiled for), simd_width, library (path),
        kernels (how many) and num_threads.

    Raises:
        ValueError: an unsupported device. RuntimeError: the kernel library cannot be loaded.
    """
    engine = _engine("device_info", device)
    return {"device": str(device), "engine": engine, **_core.device_info(engine)}


def last_dispatch() -> dict:
    """What the last call of this thread ran.

    Returns:
        operation ("fused_moe", ...), engine, family (of the expert kernels, as `select_moe_kernel` names it; "" where
        none ran), chosen_by (why that family: "tokens", their number, by the device's table; "kernel", the argument;
        "format", which has kernels of its own; "" where none ran), kernels (names in order), dispatches, commits (of
        command buffers), row_tile (rows of one expert per threadgroup), tile_n (columns of a tile, see
        `select_moe_kernel`), vectorized (whether rows were aligned for vector loads), layer_batch ("encoded" inside a
        `LayerBatch` or a `CommandStream`, "passed" where that does nothing for it, "" outside) and specialization: what
        the kernels of quantised experts were compiled for, as in "moe_trellis_swiglu_decode_6_2_3" with the bits of
        gate, up and down ("any" where experts differ), or "" where they take every format.
    """
    return _core.last_dispatch()


def set_specialization(enabled: bool) -> None:
    """Whether quantised layers whose experts are all stored alike get kernels compiled for just that (the default), or
    the kernels that serve every format, which give the same results, to rounding: for some layers another family is
    then the faster one. For comparing the two; METAL_MOE_SPECIALIZE=0 in the environment does the same from the start.
    Concerns all threads and devices, from their next call.

    Raises:
        TypeError: not a bool.
    """
    check_bool("set_specialization", "enabled", enabled)
    _core.enable_specialization(enabled)


def counters() -> dict:
    """What all threads have done on all devices since the start, or since `reset_counters()`.

    Counting costs a few nanoseconds and is always on. While other threads compute, their last calls may be counted in
    part.

    Returns:
        operations: calls that reached the kernels; dispatches; commits: of command buffers, on PyTorch's CUDA stream of
            what an operation launches, on its MPS stream none; synchronizations: waits for a command buffer, one for
            each operation on CPU tensors, none on PyTorch's streams; pool_hits, pool_misses: scratch from kept buffers,
            and allocated; copies: of arguments, before an operation.
        fallbacks: how often something else ran than what was asked for, or a slower form of it, by reason:
            unaligned_rows: sizes or addresses without whole 16-byte vectors, so that kernels take elements one by one;
            no_fp16_sums: `use_fp32_acc=False` where all kernels sum in float32;
            no_quantized_simd: "moe_simd" on quantised weights, which runs kernels of "moe_base" or "moe_large_batch";
            copied_input: hidden_states copied, as kernels of quantised weights read aligned rows only;
            converted_bias: a bias of `QuantizedExperts` converted to the dtype of hidden_states, on every call;
            passed_batch: a call inside a `LayerBatch` that ran on PyTorch's stream, where a batch does nothing;
            torch_matmul: `matmul` by PyTorch, beyond the measured size or of a layout that kernels do not read.

    Example:
        >>> metal_moe.reset_counters()
        >>> out = metal_moe.fused_experts(x, w1, w2, weights, ids)  # one token
        >>> metal_moe.counters()["dispatches"]
        2
    """
    return _core.counters()


def reset_counters() -> None:
    """`counters()` begins again at 0, for the whole process."""
    _core.reset_counters()


def pool_stats(device: str | torch.device = DEFAULT_DEVICE) -> dict:
    """Scratch memory that is kept between calls.

    On CUDA devices PyTorch keeps it: all of it is 0 there. On MPS devices it stays in use, with PyTorch's stream, until
    `pool_trim`.

    Returns:
        hits and misses (requests served from kept buffers, or by new ones), bytes and buffers in use and idle,
        high_water (most bytes in use at once) and trimmed (buffers given back so far).
    """
    return _core.pool_stats(_engine("pool_stats", device))


def pool_trim(device: str | torch.device = DEFAULT_DEVICE) -> int:
    """Gives scratch memory that is not in use back to the system; returns how many bytes. On MPS devices what the
    current stream holds follows when the GPU has run what PyTorch has given it."""
    return _core.pool_trim(_engine("pool_trim", device))


def set_num_threads(threads: int) -> None:
    """Threads that compute CPU tensors, for the whole process. Starts as METAL_MOE_NUM_THREADS, or one per processor.

    Raises:
        TypeError: not an int. ValueError: below 1.
    """
    check_int("set_num_threads", "threads", threads, 1, 4096)
    _core.set_num_threads(threads)


def get_num_threads() -> int:
    """Threads that compute CPU tensors; 0 on macOS, where only the GPU computes."""
    return _core.get_num_threads()


def set_exact_seed(seed: int) -> None:
    """Seed of the random order in which the `exact` engine runs threads and threadgroups. Results do not depend on it.

    Raises:
        TypeError: not an int. ValueError: outside 0..2**64-1.
    """
    check_int("set_exact_seed", "seed", seed, 0, 2**64 - 1)
    _core.set_exact_seed(seed)


def _engine(op: str, device: str | torch.device) -> str:
    device = torch.device(device)
    if device.type not in SUPPORTED_DEVICES:
        raise ValueError(f'{op}: device is "{device}"; it must be {choices(SUPPORTED_DEVICES)}')
    return engine_of_device(device)
