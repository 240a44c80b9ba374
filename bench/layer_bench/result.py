"""A result as a file: JSON, written and read back."""

import json
import math
from pathlib import Path
from typing import Any

# Raised whenever an entry changes its meaning: an old file is refused, not misread.
FORMAT = 1


def write(result: dict, path: Path) -> None:
    path.write_text(json.dumps(_without_infinities(result), indent=2, allow_nan=False) + "\n")


def read(path: Path) -> dict:
    """ValueError, with the path, for a file that is no result of this format."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = result.get("format") if isinstance(result, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}; this benchmark reads format {FORMAT}")
    return result


def weights_of(result: dict) -> str:
    """ "bf16", or "affine4 weights, bf16". Results of before --format have none."""
    weights, dtype = result.get("weights", result["dtype"]), result["dtype"]
    return dtype if weights == dtype else f"{weights} weights, {dtype}"


def _without_infinities(value: Any) -> Any:
    """JSON has no infinity: None, as for the error of a result with values that are not finite."""
    if isinstance(value, dict):
        return {name: _without_infinities(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_infinities(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
