"""Lists every compiled kernel with its family, format and dtype."""

import argparse

import metal_moe

from .._validate import DEFAULT_DEVICE
from .text import Progress, table

NAME = "kernels"
HELP = "every compiled kernel"
_COLUMNS = ("name", "family", "stage", "format", "dtype", "accumulation", "row_tile", "tile_n", "coded_matrices")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="a device of PyTorch (default: %(default)s)")


def run(options: argparse.Namespace, progress: Progress) -> dict:
    return {"kernels": metal_moe.kernels(options.device)}


def render(result: dict) -> str:
    kernels = result["kernels"]
    rows = [[kernel.get(column) or "-" for column in _COLUMNS] for kernel in kernels]
    return table([column.replace("_", " ") for column in _COLUMNS], rows) + f"\n{len(kernels)} kernels"
