#!/usr/bin/env python3
"""Checks `.metal` sources against Metal's rules without Apple's compiler: types with address spaces, what the language
leaves out of C++, argument tables, names of kernels. Where each rule is checked: tools/msl/.

    tools/check_msl.py [--json] [--clang CLANG] [SOURCE ...]

Without sources: all of kernels/ and tests/kernels/. Exit status 0: no rule is broken, 1: some are, 2: not checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from msl import arguments, clang, constants, house, tree
from msl.report import Finding

KERNELS = clang.ROOT / "kernels"
TEST_KERNELS = clang.ROOT / "tests" / "kernels"


@dataclass
class Checked:
    """What is wrong with a source and its headers; and what it includes and its kernels, for rules about several."""

    path: Path
    findings: list[Finding]
    included: set[Path]
    kernels: arguments.Kernels


def check_source(compiler: str, source: Path) -> Checked:
    """One source, by all rules that look at one."""
    reading = clang.read_both(compiler, source)
    findings = reading.findings + tree.check(reading.tree)
    text = clang.preprocessed(compiler, source)
    included = {Path(line.split('"')[1]).resolve() for line in text.split("\n") if line.startswith("# ")}
    kernels = arguments.Kernels([], [])
    try:
        kernels = arguments.read(text, str(source))
    except clang.msl_reader.TranslationError as error:
        file, line, message = str(error).split(":", 2)
        findings.append(Finding(clang.relative(file), int(line), message.removeprefix(" error: ")))
    findings += arguments.check(kernels) + constants.check(text, str(source))
    return Checked(source, findings, included, kernels)


def check_names(library: list[Checked]) -> list[Finding]:
    """Kernels of one library must have different names."""
    places: dict[str, str] = {}
    findings = []
    for name, token in (one for source in library for one in source.kernels.names):
        place = f"{clang.relative(token.file)}:{token.line}"
        if places.setdefault(name, place) != place:
            findings.append(arguments.finding_at(token, f"a kernel is named '{name}', as is that of {places[name]}"))
    return findings


def check_headers(sources: list[Checked]) -> list[Finding]:
    """A header that no source includes would go unchecked."""
    included = set().union(*(one.included for one in sources))
    message = "no .metal source includes this header, so its types are not checked"
    return [
        Finding(clang.relative(str(header)), 1, message)
        for header in sorted(KERNELS.rglob("*.h"))
        if header not in included
    ]


def check(compiler: str, paths: list[Path], whole_house: bool) -> list[Finding]:
    """Every broken rule, each place once."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = list(pool.map(lambda path: check_source(compiler, path), paths))
    findings = [one for source in sources for one in source.findings]
    findings += check_names([one for one in sources if KERNELS in one.path.parents])
    for source in sources:
        if KERNELS not in source.path.parents:
            findings += check_names([source])
    if whole_house:
        findings += check_headers(sources)
        paths = [*paths, *KERNELS.rglob("*.h")]
    for path in paths:
        findings += house.check(path.read_text(), clang.relative(str(path)))
    return sorted(set(findings))


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks .metal sources against Metal's rules.")
    parser.add_argument("sources", nargs="*", type=Path, help="default: all of kernels/ and tests/kernels/")
    parser.add_argument(
        "--clang", help=f"clang++, {clang.OLDEST_CLANG} or later (default: CLANGXX, or the newest found)"
    )
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    options = parser.parse_args()
    begin = time.monotonic()
    house_sources = [*KERNELS.rglob("*.metal"), *TEST_KERNELS.glob("*.metal")]
    paths = [one.resolve() for one in options.sources] or sorted(house_sources)
    try:
        findings = check(options.clang or clang.find(), paths, whole_house=not options.sources)
    except (clang.ClangMissing, OSError, RuntimeError) as error:
        print(f"check-msl: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"sources": len(paths), "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        for one in findings:
            print(one)
        seconds = time.monotonic() - begin
        print(f"check-msl: {len(paths)} sources, {len(findings)} errors, {seconds:.1f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
