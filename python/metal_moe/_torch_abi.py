"""On macOS the extension calls PyTorch's C++ side, whose binary interface changes from one release to the next."""

import sys
from importlib import import_module


def check_torch() -> None:
    """Imports PyTorch, whose libraries the extension is linked to, and compares its release with the one built with.

    ImportError where they differ: loading the extension would end in a missing symbol, or in worse. Nothing on other
    systems, where the extension does not know PyTorch.
    """
    if sys.platform != "darwin":
        return
    import torch

    built_with = import_module("._build", __package__).TORCH_VERSION
    compare(built_with, torch.__version__)


def compare(built_with: str, running: str) -> None:
    """ImportError unless both versions are of one release, "2.13" of "2.13.0+cpu"."""
    if release(built_with) == release(running):
        return
    raise ImportError(
        f"this metal_moe was built with PyTorch {built_with}, but PyTorch {running} is installed, and their binary "
        f"interfaces differ. Install torch=={release(built_with)}.*, or build metal_moe for the PyTorch that is there: "
        "`pip install --no-build-isolation .` in its sources"
    )


def release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
