"""What `metal-moe tune` measured: a table on disk, read once for each device when it is first used.

The table is JSON: `format` and `records`, one for each device, engine and version of the library:

    device, engine, version   what it holds for; a record of anything else is not used
    layers                    thresholds of the kernel families, each for layers of one shape and kind of weights (see
                              `LayerRecord`), or with hidden 0 for all other shapes
    matmul                    by dtype, up to how many multiply-adds `matmul` runs our kernel

Where there is no table, or it cannot be read, defaults of the device hold. Results do not depend on any of it beyond
rounding.
"""

import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import TypedDict

import torch

from . import _core

PATH_VARIABLE = "METAL_MOE_TUNING"
# Raised whenever an entry changes its meaning: an old table is refused, not misread.
FORMAT = 1

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A threshold that no number of tokens reaches.
UNLIMITED = 2**32 - 1
THRESHOLDS = ("decode_tokens", "prefill4_tokens", "base_tokens")

# Up to how many multiply-adds our kernel runs where `metal-moe tune` has measured nothing: 64 x 256 by 256 x 256. A
# guess at where a GPU begins to take longer to compute than to launch.
DEFAULT_LIMIT = 64 * 256 * 256
# bench/linear.py in fp32: PyTorch's library is faster at every size, on an H200 and on x86-64-v3 (AVX2), the only
# processors that it has run on. In 16 bits, which the latter has no instructions for, ours is as fast at 64 x 64 there
# and faster at all larger sizes, far beyond DEFAULT_LIMIT too; with such instructions (AVX-512, AMX) nobody has
# measured.
DEFAULT_LIMITS = {("native", torch.float32): 0, ("cuda", torch.float32): 0}


class LayerRecord(TypedDict, total=False):
    """Thresholds for layers of one shape (hidden 0: of every shape), dtype and kind of weights."""

    model: str
    """Whose layer it was, for the reader."""
    weights: str
    """Format of the weights, for the reader."""
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str
    quantized: bool
    weight_bits: float
    """Bits of a weight with its scales."""
    trellis: bool
    """Whether all weights are trellis codes; false where it is missing."""
    decode_tokens: int
    """Most tokens of the decode family; then of prefill4 and of base; large_batch has the rest."""
    prefill4_tokens: int
    base_tokens: int
    row_tile_per_mean_rows: float
    """large_batch takes the smallest row tile of at least this many times the mean rows per expert,"""
    largest_row_tile: int
    """or this one."""
    seconds: dict[str, dict[str, float]]
    """What was measured: by tokens, by family."""


class Record(TypedDict, total=False):
    device: str
    engine: str
    version: str
    date: str
    threads: int
    layers: list[LayerRecord]
    matmul: dict[str, int]


def path() -> Path | None:
    """The table's place: METAL_MOE_TUNING, or tuning.json in the user's folder of settings. None where METAL_MOE_TUNING
    is empty: no table is read."""
    given = os.environ.get(PATH_VARIABLE)
    if given is not None:
        return Path(given) if given else None
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "metal_moe" / "tuning.json"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "metal_moe" / "tuning.json"


def read(file: Path) -> list[Record]:
    """The records of a table; none where there is no file. ValueError, with the path, for any other file."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no tuning table: {error}") from error
    found = table.get("format") if isinstance(table, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} is no tuning table of this version: format is {found!r}; it must be {FORMAT}")
    records = table.get("records")
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise ValueError(f"{file} is no tuning table: records is not a list of objects")
    return records


def write(file: Path, records: list[Record]) -> None:
    """Replaces the table, as a whole: a reader finds the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps({"format": FORMAT, "records": records}, indent=1) + "\n", encoding="utf-8")
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def is_of(record: Record, device_name: str) -> bool:
    """Whether a record holds for a device, with this version of the library."""
    return record.get("device") == device_name and record.get("version") == _version()


def _version() -> str:
    from . import __version__

    return __version__


_LAYER_FIELDS = {
    "hidden": int,
    "intermediate": int,
    "experts": int,
    "top_k": int,
    "dtype": str,
    "quantized": bool,
    "weight_bits": float,
    "trellis": bool,
    **dict.fromkeys(THRESHOLDS, int),
    "row_tile_per_mean_rows": float,
    "largest_row_tile": int,
}


def _field(entry: dict, name: str, kind: type) -> object:
    value = entry[name]
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    if kind is int and not 0 <= value <= UNLIMITED:
        raise ValueError(f"{name} is {value}; it must be from 0 to {UNLIMITED}")
    return value


def layer_entries(record: Record) -> list[dict]:
    """The layers of a record as the core takes them. ValueError naming the field that is wrong."""
    layers = record.get("layers", [])
    if not isinstance(layers, list) or not all(isinstance(one, dict) for one in layers):
        raise ValueError("layers is not a list of objects")
    return [{name: _field(one, name, kind) for name, kind in _LAYER_FIELDS.items() if name in one} for one in layers]


def _matmul_limits(record: Record) -> dict[torch.dtype, int]:
    limits = record.get("matmul", {})
    if not isinstance(limits, dict) or not set(limits) <= set(DTYPES):
        raise ValueError(f"matmul is {limits!r}; it must be an object of {', '.join(DTYPES)}")
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"matmul {name} is {value!r}; it must be an integer, at least 0")
    return {DTYPES[name]: value for name, value in limits.items()}


# By engine ("native", "cuda:1", ...). Whole dicts are replaced, so a reader needs no lock.
_limits: dict[str, dict[torch.dtype, int]] = {}
_lock = threading.Lock()


def default_matmul_limit(engine: str, dtype: torch.dtype) -> int:
    return DEFAULT_LIMITS.get((engine.partition(":")[0], dtype), DEFAULT_LIMIT)


def matmul_limit(engine: str, dtype: torch.dtype) -> int:
    """Up to how many multiply-adds `matmul` runs our kernel."""
    limits = _limits.get(engine)
    if limits is None:
        _core.default_tuning(engine)  # makes the engine, which reads the table
        limits = _limits.get(engine, {})  # another thread may be reading it: defaults until then
    limit = limits.get(dtype)
    return default_matmul_limit(engine, dtype) if limit is None else limit


def apply(engine: str, device_name: str) -> None:
    """Gives an engine what the table has for its device, from the next call on; what it had is forgotten.

    A table that cannot be used is a warning, and the defaults hold.
    """
    layers: list[dict] = []
    limits: dict[torch.dtype, int] = {}
    problem = None
    file = path()
    with _lock:
        try:
            for record in read(file) if file is not None else []:
                if is_of(record, device_name):
                    layers, limits = layer_entries(record), _matmul_limits(record)
            _core.set_tuning_table(engine, layers)
        except (ValueError, RuntimeError) as error:
            problem, limits = str(error), {}
            _core.set_tuning_table(engine, [])
        _limits[engine] = limits
    if problem is not None:
        where = "" if str(file) in problem else f"{file}: "
        message = f"metal_moe: the tuning table is not used, defaults hold on {device_name}: {where}{problem}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


_core.on_new_engine(apply)
