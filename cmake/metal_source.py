#!/usr/bin/env python3
"""Writes a `.metal` source as one text that Metal compiles at run time, where the build had no Metal compiler.

    python cmake/metal_source.py -I kernels kernels/moe/route.metal -o route.metal

Headers of ours are put in their places, each once; Metal's own stay included. The text begins with what must be known
before anything is compiled, one comment line each:

    //! digest HEX     of all that follows: compiled kernels are kept on disk under it
    //! kernel NAME    a function of the library that the text compiles to

The names are read as the stand-in for Metal reads them (csrc/sim/translate.py), after the host compiler's preprocessor.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "sim"))

import translate  # noqa: E402 (its folder comes first)
from msl_reader import Target, TranslationError, read  # noqa: E402

INCLUDE = re.compile(r'^\s*#\s*include\s+"(?P<name>[^"]+)"')
PRAGMA_ONCE = re.compile(r"^\s*#\s*pragma\s+once\b")


def find(name: str, includer: Path, folders: list[Path]) -> Path:
    for folder in [includer.parent, *folders]:
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise TranslationError(f'{includer}: #include "{name}" is in none of {[str(one) for one in folders]}')


def inline(path: Path, folders: list[Path], seen: set[Path]) -> str:
    """The text of a file with the headers that it includes in their places. Lines keep their file and number."""
    seen.add(path.resolve())
    shown = next((path.relative_to(one) for one in folders if path.is_relative_to(one)), path.name)
    lines = [f'#line 1 "{shown}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = INCLUDE.match(line)
        header = find(match["name"], path, folders) if match else None
        if header is None:
            lines.append("" if PRAGMA_ONCE.match(line) else line)
        elif header in seen:
            lines.append("")
        else:
            lines += [inline(header, folders, seen), f'#line {number + 1} "{shown}"']
    return "\n".join(lines)


def kernel_names(source: Path, folders: list[Path], compiler: str, depfile: str | None, output: str) -> list[str]:
    options = argparse.Namespace(
        compiler=compiler,
        level="generic",
        engine="exact",
        include=[str(folder) for folder in folders],
        define=[],
        depfile=depfile,
        output=output,
        source=str(source),
    )
    text = translate.preprocess(options)
    return sorted(
        one.host_name for one in read(text, str(source), Target("exact", translate.is_gcc(compiler))).instances
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a .metal file")
    parser.add_argument("-o", "--output", required=True, help="the text to write")
    parser.add_argument("--compiler", default="c++", help="its preprocessor is used to find the kernels' names")
    parser.add_argument("-I", "--include", action="append", default=[], type=Path, metavar="FOLDER")
    parser.add_argument("--depfile", help="write the source's dependencies for make or ninja")
    options = parser.parse_args()
    folders = [folder.resolve() for folder in options.include]
    try:
        names = kernel_names(options.source, folders, options.compiler, options.depfile, options.output)
        text = inline(options.source.resolve(), folders, set()) + "\n"
    except TranslationError as error:
        print(error, file=sys.stderr)
        return 1
    body = "".join(f"//! kernel {name}\n" for name in names) + text
    digest = hashlib.sha256(body.encode()).hexdigest()
    Path(options.output).write_text(f"//! digest {digest}\n{body}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
