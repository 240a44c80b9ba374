"""How a benchmark ends: with what is wrong with its result, and the exit status that says so."""

import sys
from collections.abc import Sequence


def exit_status(failures: Sequence[str]) -> int:
    """1 where there are failures, which are told on stderr, else 0."""
    for line in failures:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if failures else 0
