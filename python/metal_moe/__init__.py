"""Mixture-of-Experts layers on Apple GPUs from PyTorch, and on any CPU and NVIDIA GPU through the same Metal
kernels.
"""

import os as _os
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path

from ._torch_abi import check_torch as _check_torch

_check_torch()

from . import _core  # noqa: E402 (the check comes first)

# The kernels lie beside the extension; METAL_MOE_LIBRARY names another build of them.
_core.set_library_path(_os.environ.get("METAL_MOE_LIBRARY") or str(_Path(_core.__file__).parent / "metal_moe.metallib"))

from ._trace import start_from_environment as _start_trace  # noqa: E402 (the library's path comes first)
from .command_stream import CommandStream, Completion  # noqa: E402
from .device import (  # noqa: E402
    SUPPORTED_DEVICES,
    counters,
    device_info,
    get_num_threads,
    kernels,
    last_dispatch,
    pool_stats,
    pool_trim,
    reset_counters,
    select_moe_kernel,
    set_exact_seed,
    set_num_threads,
    set_specialization,
)
from .experts import fused_experts, fused_moe, gather_experts  # noqa: E402
from .formats import QuantizedExperts  # noqa: E402
from .gpu import Residency, capture, keep_resident  # noqa: E402
from .grouping import GroupedTokens, group_tokens  # noqa: E402
from .layer_batch import LayerBatch  # noqa: E402
from .linear import lora, matmul  # noqa: E402
from .profile import KernelProfile, Profile, profile  # noqa: E402
from .routing import fused_topk  # noqa: E402

_start_trace()

try:
    __version__ = _version("metal_moe")
except _PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "SUPPORTED_DEVICES",
    "CommandStream",
    "Completion",
    "GroupedTokens",
    "KernelProfile",
    "LayerBatch",
    "Profile",
    "QuantizedExperts",
    "Residency",
    "__version__",
    "capture",
    "counters",
    "device_info",
    "fused_experts",
    "fused_moe",
    "fused_topk",
    "gather_experts",
    "get_num_threads",
    "group_tokens",
    "keep_resident",
    "kernels",
    "last_dispatch",
    "lora",
    "matmul",
    "pool_stats",
    "pool_trim",
    "profile",
    "reset_counters",
    "select_moe_kernel",
    "set_exact_seed",
    "set_num_threads",
    "set_specialization",
]
