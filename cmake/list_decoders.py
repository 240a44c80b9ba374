#!/usr/bin/env python3
"""Writes kernels/formats/decoders.h, the list of decoders, from what the headers beside it say they have.

    python cmake/list_decoders.py kernels/formats [--check]

A header lists its decoders in a line, `// Decoders: AffineRun<2>, AffineRun<3>`; quantized.h says what a decoder is.
The build runs this when a header comes or changes; --check writes nothing and says whether the list is the headers'.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

LIST = "decoders.h"
# Types with commas between template arguments stay whole.
DECODERS = re.compile(r"^// Decoders: (?P<types>.+)$", re.MULTILINE)
TYPE = re.compile(r"\s*(\w+(?:<[\w\s,*/+-]+>)?)\s*(?:,|$)")


def decoders_of(header: Path) -> list[str]:
    """The types that a header lists; none where it has no such line."""
    found = []
    for line in DECODERS.finditer(header.read_text()):
        text, at = line["types"], 0
        while at < len(text):
            match = TYPE.match(text, at)
            if match is None:
                raise ValueError(f"{header}: '{line[0]}' has no decoder's type at '{text[at:]}'")
            found.append(match[1])
            at = match.end()
    return found


def list_of(folder: Path) -> str:
    """The text of decoders.h for the headers in `folder`."""
    by_header = {header.name: decoders_of(header) for header in sorted(folder.glob("*.h"))}
    listed = {name: types for name, types in by_header.items() if types}
    types = [one for own in listed.values() for one in own]
    if not types:
        raise ValueError(f"{folder}: no header has a line '// Decoders: ...'")
    if len(set(types)) < len(types):
        raise ValueError(f"{folder}: {next(one for one in types if types.count(one) > 1)} is listed twice")
    includes = "\n".join(f'#include "{name}"' for name in listed)
    # The last one without a comparison: a record has one of them.
    labels = [f"case {one}::FORMAT * 64 + {one}::BITS:" for one in types[:-1]] + ["default:"]
    cases = "\n".join(
        f"  {label}\n    return visit.template run<{one}>();" for label, one in zip(labels, types, strict=True)
    )
    return f"""// From a matrix to its decoder: written by cmake/list_decoders.py from lines of the other headers.
#pragma once
{includes}

/// visit.run<Decoder>() with the decoder of `matrix`. Uniform in a simdgroup, outside of its inner loops. Inlined
/// always: a kernel that is compiled for one format must not keep the decoders of the others.
template <typename Visit>
METAL_FUNC void with_decoder(thread const QuantizedMatrix& matrix, thread const Visit& visit) {{
  switch (matrix.format * 64 + matrix.bits) {{
{cases}
  }}
}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="kernels/formats")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the list is another")
    options = parser.parse_args()
    target = options.folder / LIST
    try:
        text = list_of(options.folder)
        if target.exists() and target.read_text() == text:
            return 0
        if options.check:
            print(f"{target} is not what cmake/list_decoders.py makes of the headers beside it", file=sys.stderr)
            return 1
        target.write_text(text)
    except (OSError, ValueError) as error:
        print(f"list_decoders: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
