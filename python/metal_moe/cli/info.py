"""Shows which device, engine, kernel library and versions are in use."""

import argparse
import platform
import sys

import torch

import metal_moe

from .._validate import DEFAULT_DEVICE
from .text import Progress

NAME = "info"
HELP = "device, engine, kernel library, versions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="a device of PyTorch (default: %(default)s)")


def run(options: argparse.Namespace, progress: Progress) -> dict:
    return {
        "versions": {
            "metal_moe": metal_moe.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "executable": sys.executable,
        "torch_threads": torch.get_num_threads(),
        "threads": metal_moe.get_num_threads(),
        "device": metal_moe.device_info(options.device),
        "pool": metal_moe.pool_stats(options.device),
    }


def render(result: dict) -> str:
    lines: list[tuple[str, object]] = []
    for name, value in result.items():
        if isinstance(value, dict):
            lines += [(name if name == inner else f"{name} {inner}", entry) for inner, entry in value.items()]
        else:
            lines.append((name, value))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)
