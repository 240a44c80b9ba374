"""What a result was measured with: device, versions, commit, date."""

import ctypes
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import metal_moe
import torch
from metal_moe._nvrtc import nvrtc_library

# The commit that was measured, for copies of the sources that are no checkout.
COMMIT_VARIABLE = "METAL_MOE_COMMIT"


def environment(device: torch.device) -> dict:
    info = metal_moe.device_info(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        # Where the library lies says nothing about the result.
        "device": {name: value for name, value in info.items() if name != "library"},
        "versions": versions(device),
        "threads": {"metal_moe": metal_moe.get_num_threads(), "torch": torch.get_num_threads()},
    }


def commit() -> str | None:
    """METAL_MOE_COMMIT, or what git says of this file's checkout, "-dirty" with changes; None where neither knows."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(device: torch.device) -> dict:
    found = {
        "metal_moe": metal_moe.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        found |= {
            "cuda_of_torch": torch.version.cuda,
            "cuda_driver": _cuda_driver(),
            "nvidia_driver": _nvidia_driver(),
            "nvrtc": _nvrtc(),
        }
    return found


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _cuda_driver() -> str | None:
    """The CUDA version that the driver knows: "13.0"."""
    driver = _library(os.environ.get("METAL_MOE_CUDA_DRIVER") or "libcuda.so.1")
    number = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _nvidia_driver() -> str | None:
    """The driver's own version: "580.95.05"."""
    management = _library("libnvidia-ml.so.1")
    if management is None or management.nvmlInit_v2() != 0:
        return None
    text = ctypes.create_string_buffer(96)
    found = management.nvmlSystemGetDriverVersion(text, len(text)) == 0
    management.nvmlShutdown()
    return text.value.decode() if found else None


def _nvrtc() -> str | None:
    """The version of the compiler that kernels are compiled with."""
    path = os.environ.get("METAL_MOE_NVRTC") or nvrtc_library()
    compiler = _library(path) if path else None
    major, minor = ctypes.c_int(), ctypes.c_int()
    if compiler is None or compiler.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    return f"{major.value}.{minor.value}"
