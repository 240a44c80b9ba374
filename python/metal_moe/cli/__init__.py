"""The command line: `metal-moe info`, `kernels`, `demo`, `repro`, `profile`, `quantize` and `tune`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import demo, info, kernels, profile, quantize, repro, tune
from .text import Progress

_COMMANDS = (info, kernels, demo, repro, profile, quantize, tune)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 where the command found or met an error, 2 for wrong usage.

    A command is a module with `NAME`, `HELP`, `add_arguments(parser)`, `run(options, progress) -> dict`,
    `render(result) -> str` and, where it can fail on its result, `status(result) -> int`. Results go to stdout, as text
    or with --json as one JSON object; progress and errors go to stderr.
    """
    parser = argparse.ArgumentParser(
        prog="metal-moe", description="Mixture-of-Experts layers through Metal kernels, on Apple GPUs and on CPUs."
    )
    parser.add_argument("--version", action="version", version=f"metal-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in _COMMANDS:
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.__doc__)
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
        module.add_arguments(command)
        command.set_defaults(module=module)
    options = parser.parse_args(arguments)
    try:
        with Progress() as progress:
            result = options.module.run(options, progress)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        print(f"metal-moe {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    try:
        print(json.dumps(result, indent=2) if options.json else options.module.render(result), flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing more may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"metal-moe {options.command}: the result could not be printed: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return options.module.status(result) if hasattr(options.module, "status") else 0
