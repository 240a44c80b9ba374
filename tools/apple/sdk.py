"""A stand-in for Apple's SDK and Xcode's tools on Linux, for compiling and linking alone.

zig carries macOS's C headers and the symbols of libSystem. What is missing is made here:

- programs named c++, ar and ranlib, which call zig with the target and what CMake's idea of a Mac needs;
- headers of Apple's frameworks, as far as metal-cpp and PyTorch name them (tools/apple/headers, forward declarations);
- text stubs (.tbd) of libc++, libobjc and the frameworks. What such a library exports is not invented: it is what the
  macOS libraries of PyTorch and MLX, built with Apple's own SDK for the same system, import from it, and the few
  symbols in EXTRA, each with its reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from macho import MachO

MINIMUM_MACOS = "14.0"
HEADERS = Path(__file__).resolve().parent / "headers"

# Install name -> where the linker looks for its stub, below the SDK.
SYSTEM_LIBRARIES = {
    "/usr/lib/libc++.1.dylib": "usr/lib/libc++.tbd",
    "/usr/lib/libobjc.A.dylib": "usr/lib/libobjc.tbd",
}
FRAMEWORKS = ("Foundation", "CoreFoundation", "Metal")

# Symbols that nobody in the evidence imports, and why they are known to exist.
_FILESYSTEM = "std::filesystem is in libc++ since macOS 10.15; the evidence imports other parts of it"
EXTRA: dict[str, dict[str, str]] = {
    "/usr/lib/libc++.1.dylib": {
        "__ZNKSt3__14__fs10filesystem18directory_iterator13__dereferenceEv": _FILESYSTEM,
        "__ZNKSt3__14__fs10filesystem4path9__compareENS_17basic_string_viewIcNS_11char_traitsIcEEEE": _FILESYSTEM,
        "__ZNSt3__14__fs10filesystem18directory_iterator11__incrementEPNS_10error_codeE": _FILESYSTEM,
        "__ZNSt3__14__fs10filesystem18directory_iteratorC1ERKNS1_4pathEPNS_10error_codeENS1_17directory_optionsE": (
            _FILESYSTEM
        ),
    },
}


def imports_by_library(files: Iterable[MachO]) -> dict[str, set[str]]:
    """Install name of a system library -> every symbol that one of the files binds to it."""
    result: dict[str, set[str]] = {}
    for file in files:
        for symbol, library in file.undefined.items():
            if library.startswith(("/usr/lib/", "/System/")):
                result.setdefault(library, set()).add(symbol)
    return result


def only_weak(files: Iterable[MachO]) -> set[str]:
    """Symbols of system libraries that every file binds so that they may be missing."""
    weak = set().union(*(file.weak for file in files))
    strong = set().union(*(set(file.undefined) - file.weak for file in files))
    return weak - strong


def write_stub(path: Path, install_name: str, symbols: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = sorted(s.removeprefix("_OBJC_CLASS_$_") for s in symbols if s.startswith("_OBJC_CLASS_$_"))
    plain = sorted(s for s in symbols if not s.startswith("_OBJC_"))
    exports = [f"  - targets: [ arm64-macos ]\n    symbols: [ {', '.join(map(_quoted, plain))} ]\n"]
    if classes:
        exports[0] += f"    objc-classes: [ {', '.join(map(_quoted, classes))} ]\n"
    path.write_text(
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
        f"install-name: '{install_name}'\nexports:\n{''.join(exports)}...\n"
    )


def _quoted(symbol: str) -> str:
    return f"'{symbol}'"


def write(folder: Path, zig: Path, evidence: Iterable[MachO]) -> dict[str, set[str]]:
    """Makes the SDK in `folder`; returns what each of its libraries exports, by install name."""
    shutil.rmtree(folder, ignore_errors=True)
    exports = imports_by_library(evidence)
    for install_name, symbols in EXTRA.items():
        exports.setdefault(install_name, set()).update(symbols)
    places = dict(SYSTEM_LIBRARIES)
    for name in FRAMEWORKS:
        install_name = next(one for one in exports if f"/{name}.framework/" in one)
        places[install_name] = f"System/Library/Frameworks/{name}.framework/{name}.tbd"
    result = {}
    for install_name, place in places.items():
        result[install_name] = exports.get(install_name, set())
        write_stub(folder / place, install_name, result[install_name])
    shutil.copytree(HEADERS, folder / "usr" / "include")
    _write_program(folder / "bin" / "c++", zig, "c++", folder)
    _write_program(folder / "bin" / "cc", zig, "cc", folder)
    for tool in ("ar", "ranlib"):
        _write_program(folder / "bin" / tool, zig, tool, None)
    return result


# CMake asks a Mac's compiler and linker for these; zig has the target instead, and no use for the others.
_DROPPED = (
    "-mmacosx-version-min=*|-mmacos-version-min=*|-Wl,-search_paths_first|-Wl,-headerpad_max_install_names"
    "|-flto*|-Wl,-x|-Wl,-S"
)


def _write_program(path: Path, zig: Path, tool: str, sdk: Path | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cache = path.parent.parent.parent / "zig-cache"
    lines = ["#!/usr/bin/env bash", f"export ZIG_GLOBAL_CACHE_DIR='{cache}' ZIG_LOCAL_CACHE_DIR='{cache}'"]
    if sdk is None:
        lines.append(f"exec '{zig}' {tool} \"$@\"")
    else:
        # A bundle and a dynamic library are loaded alike; zig links only the latter. Its own libc++ must stay out: an
        # exception crosses from PyTorch's code to ours only where both use the system's.
        lines += [
            "arguments=() compile=0 skip=0",
            'for one in "$@"; do',
            "  if [ $skip = 1 ]; then skip=0; continue; fi",
            '  case "$one" in',
            f"    {_DROPPED}) ;;",
            "    -arch|-isysroot) skip=1 ;;",
            "    -bundle) arguments+=(-dynamiclib) ;;",
            "    -lobjc) arguments+=('" + str(sdk / "usr/lib/libobjc.tbd") + "') ;;",
            '    -c|-E|-S|-fsyntax-only) compile=1; arguments+=("$one") ;;',
            '    *) arguments+=("$one") ;;',
            "  esac",
            "done",
            # As Apple's own headers would: use nothing of libc++ that this macOS does not have.
            f"common=(-target aarch64-macos.{MINIMUM_MACOS} -isystem '{sdk}/usr/include')",
            f"common+=(-F'{sdk}/System/Library/Frameworks')",
            "common+=(-fno-sized-deallocation -g0 -U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS)",
            "common+=(-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1)",
            f'[ $compile = 1 ] && exec \'{zig}\' {tool} "${{common[@]}}" "${{arguments[@]}}"',
            f"exec '{zig}' {tool} \"${{common[@]}}\" -nostdlib++ \"${{arguments[@]}}\" '{sdk}/usr/lib/libc++.tbd'",
        ]
    path.write_text("\n".join(lines) + "\n")
    os.chmod(path, 0o755)
