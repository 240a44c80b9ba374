"""METAL_MOE_TRACE: a log on stderr, or a trace file, from the moment that the package is imported."""

import atexit
import os
from collections.abc import Mapping
from pathlib import Path

from . import _core

VARIABLE = "METAL_MOE_TRACE"


def start_from_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Starts what the variable asks for.

    "1": a line on stderr for each dispatch and commit. A name that ends in ".json": a Chrome trace, which Perfetto
    reads. "0" or nothing: neither.

    Raises:
        ValueError: another value, or a file that cannot be written.
    """
    value = environment.get(VARIABLE, "")
    if value in ("", "0"):
        return
    if value == "1":
        _core.start_log()
        return
    path = Path(value).absolute()
    if path.suffix != ".json":
        raise ValueError(
            f'{VARIABLE} is "{value}"; it must be "1" (a log on stderr), "0", or a file name that ends in ".json"'
        )
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f'{VARIABLE} is "{value}"; it must be a file that can be written')
    _core.start_trace(str(path))
    atexit.register(_core.collect)  # while devices can still be asked for their times
