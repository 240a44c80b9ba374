"""Rules of this repository's own for kernel sources, which no compiler knows."""

from __future__ import annotations

import re

from .report import Finding

COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
THIRTY_TWO = re.compile(r"(?<![\w.])(?:32|0[xX]20)[uUlL]*(?![\w.])")
DEFINITION = re.compile(r"^\s*#\s*define\s+SIMD_WIDTH\s")


def check(text: str, file: str) -> list[Finding]:
    """A simdgroup's width is SIMD_WIDTH. Where a 32 is something else, a comment in its line says so: `// 32: ...`."""
    code = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    findings = []
    for number, (line, full) in enumerate(zip(code.split("\n"), text.split("\n"), strict=True), 1):
        explained = THIRTY_TWO.search(full[len(line.rstrip()) :]) or re.search(r"(?://|/\*).*\b32\b", full)
        if THIRTY_TWO.search(line) and not DEFINITION.match(line) and not explained:
            message = (
                "a literal 32: the width of a simdgroup is SIMD_WIDTH; what else it is, a comment says (// 32: ...)"
            )
            findings.append(Finding(file, number, message))
    return findings
