"""clang reads a Metal source twice, each time as a language that has Metal's address spaces.

`cxx14` is C++14, the language that Metal 3.1 is made from, with `address_space` attributes for `device`, `constant` and
`threadgroup`. What names none is in `thread` memory, `this` included, as in Metal up to 4.0. What C++17 brought is an
error here.

`opencl` is C++ for OpenCL. What names no address space is generic there, as in Metal 4.1, so that it can be told from
`thread`; and function pointers, `double`, virtual functions, exceptions, static locals and the like are errors, since
OpenCL forbids what Metal does. Its syntax tree is what `tree.py` works on.

Neither language would do alone. OpenCL with `thread` as the default refuses arrays of structs as members ("has no
default constructor"), and its base is C++17; C++14 with attributes cannot tell a forgotten `thread` from none and knows
nothing of OpenCL's restrictions. And in both a plain struct cannot be copied out of every address space, which Metal
allows: those errors are left out (`_is_struct_copy`).

What is stricter here than Metal may be, on purpose: a temporary does not bind to a `thread const T&` parameter in
OpenCL (Metal's specification does not say), so kernels give it a name first; a constant of a struct type cannot be what
a function returns, because C++14 would copy it into the constant address space; and member functions work on objects in
thread memory only, because C++14 has no address space for `this`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .report import Finding

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "csrc" / "sim"))
import msl_reader  # noqa: E402  (Metal's number literals, in one place)

PRELUDE = Path(__file__).resolve().parent / "prelude.h"
OLDEST_CLANG = 19
# Metal 3.1 is the newest language of macOS 14, the oldest system that is supported, and the first with bfloat.
METAL_VERSION = 310
# What the stand-in's compilers define for every source, and kernels/tiles/simd.h for those of kernels/.
SIMD_WIDTH = 32
COMMON = [
    *("-target", "x86_64-unknown-linux-gnu", "-nostdinc", f"-D__METAL_VERSION__={METAL_VERSION}"),
    # scan/: empty headers for metal_stdlib and friends.
    *(f"-I{ROOT / 'kernels'}", f"-I{msl_reader.SCAN}"),
    *("-ferror-limit=0", "-fno-caret-diagnostics", "-fno-color-diagnostics"),
    # The prelude only declares, and attributes, which use constants, are gone when clang checks types.
    *("-Wno-undefined-inline", "-Wno-undefined-internal", "-Wno-unused-const-variable", "-Wno-return-type"),
]
CXX14 = ["-x", "c++", "-std=c++14", "-Wall", "-Wextra"]
OPENCL = [
    *("-x", "clcpp", "-cl-std=CLC++2021", "-cl-no-stdinc", "-cl-single-precision-constant", "-Wpre-c++17-compat"),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"),
]
# A vector of a type that is a template's parameter: see typing_vector in the prelude.
VECTOR = re.compile(r"\b(?:metal::)?vec<(?P<arguments>(?:[^<>()]|\([^()]*\))*)>(?=\()")
# A function constant, after the preprocessor: what gives it a value is no part of the source.
FUNCTION_CONSTANT = re.compile(
    r"(?:\b__constant|__attribute__\(\(address_space\(2\)\)\) const)(?=\s+\w+\s+\w+\s*\[\[\s*function_constant\b)"
)
ATTRIBUTE = re.compile(r"\[\[[^\[\]]*\]\]")
KERNEL = re.compile(r"\bkernel\b(?=\s+void\b)")
NUMBER = re.compile(r"(?<![\w.])\.?\d(?:[eEpP][+-]|[\w.'])*")
DIAGNOSTIC = re.compile(
    r"^(?P<file>[^\s:]+):(?P<line>\d+):\d+: (?P<kind>fatal error|error|warning|note): (?P<text>.*)$"
)
STRUCT_COPY = re.compile(r"^(no matching constructor for initialization of '|no viable overloaded '='$)")
STRUCT_COPY_NOTE = re.compile(
    r"^candidate (constructor|function) \(the implicit (copy|move) \w+( \w+)?\) not viable: .*address space"
    r"|^candidate constructor \(the implicit default constructor\) not viable"
    r"|^in instantiation of "
)
HINTS = [
    (
        re.compile(
            r"^candidate template ignored: cannot deduce a type for '\w+' that would make '(const )?__private \w+' eq"
            r"|^candidate template ignored: could not match '(const )?__private .*' against '[^_]"
            r"|^candidate function not viable: cannot bind reference in default address space to object in .*__private"
        ),
        "a temporary is taken by reference: give it a name first",
    ),
    (
        re.compile(r"^candidate constructor ignored: cannot be used to construct an object in address space"),
        "give a constant of a struct type its members in braces, or take members of the call's result",
    ),
]
# What clang says, and what it is called in Metal.
SPACES = {1: "device", 2: "constant", 3: "threadgroup"}
WORDS = [
    *((re.compile(rf"__attribute__\(\(address_space\({number}\)\)\)"), word) for number, word in SPACES.items()),
    *((re.compile(f"address space '{number}'"), f"address space '{word}'") for number, word in SPACES.items()),
    (re.compile(r"__global\b"), "device"),
    (re.compile(r"__constant\b"), "constant"),
    (re.compile(r"__local\b"), "threadgroup"),
    (re.compile(r"__private\b"), "thread"),
    (re.compile(r"__generic\b"), "(no address space)"),
    (re.compile(r"local address space"), "threadgroup address space"),
    (re.compile(r"(?:C\+\+ for )?OpenCL(?: C)?(?: version \d+)?"), "Metal"),
    (re.compile(r" requires cl_khr_fp64.*"), " is not supported in Metal"),
    (re.compile(r"(is|are) (?:a C\+\+17 extension|incompatible with C\+\+ standards before C\+\+17)"), r"\1 C++17"),
    (re.compile(r" \[-W(?:c\+\+17-extensions|pre-c\+\+17-compat)\]"), "; Metal 3.1 is C++14"),
    (re.compile(r"('\w[^']*') file not found"), r"\1 not found: Metal has its own standard library only"),
]


class ClangMissing(Exception):
    """No clang, or none that is new enough."""


@dataclass
class Reading:
    """What clang made of a source: its errors, and the syntax tree as text."""

    findings: list[Finding]
    tree: str


def find() -> str:
    """The newest clang++ on the path; CLANGXX overrides it."""
    named = os.environ.get("CLANGXX")
    for candidate in [named] if named else ["clang++", *(f"clang++-{version}" for version in range(30, 14, -1))]:
        path = shutil.which(candidate)
        if path and _major_version(path) >= OLDEST_CLANG:
            return path
    where = f"CLANGXX ({named}) is none" if named else "there is none on the path"
    raise ClangMissing(
        f"Metal's typing rules are checked with clang++ of version {OLDEST_CLANG} or later, and {where}; "
        f"install one (Debian and Ubuntu: clang-{OLDEST_CLANG}) or name one in CLANGXX"
    )


def _major_version(clang: str) -> int:
    text = subprocess.run([clang, "-dumpversion"], capture_output=True, text=True, check=False).stdout
    return int(text.split(".")[0] or 0)


def read_both(clang: str, source: Path) -> Reading:
    """Both readings of a source. Errors of the second in lines where the first has one are left out."""
    first, second = read(clang, CXX14, source), read(clang, OPENCL, source)
    taken = {(one.file, one.line) for one in first.findings if "[-W" not in one.message}
    findings = first.findings + [one for one in second.findings if (one.file, one.line) not in taken]
    return Reading(findings, second.tree)


def read(clang: str, language: list[str], source: Path) -> Reading:
    """One reading; the syntax tree comes with `OPENCL` only."""
    done = _preprocess(clang, [*language, "-include", str(PRELUDE)], source)
    if done.returncode != 0:
        return Reading(_findings(done.stderr), "")
    tree = ["-Xclang", "-ast-dump"] if language is OPENCL else []
    check = [clang, *language, *COMMON, *tree, "-fsyntax-only", "-"]
    checked = subprocess.run(check, input=as_cxx(done.stdout), capture_output=True, text=True, check=False)
    findings = _findings(checked.stderr)
    if checked.returncode != 0 and "error:" not in checked.stderr:
        raise RuntimeError(f"{' '.join(check)} failed: {checked.stderr}")
    return Reading(findings, checked.stdout)


def preprocessed(clang: str, source: Path) -> str:
    """A source as Metal, with all it includes; empty where that fails, which a reading reports."""
    done = _preprocess(clang, CXX14, source)
    return done.stdout if done.returncode == 0 else ""


def _preprocess(clang: str, options: list[str], source: Path) -> subprocess.CompletedProcess[str]:
    width = [] if ROOT / "kernels" in source.parents else [f"-DSIMD_WIDTH={SIMD_WIDTH}"]
    command = [clang, *options, *COMMON, *width, "-E", os.path.relpath(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def as_cxx(text: str) -> str:
    """Preprocessed Metal without attributes, whose names and places C++ does not know all, without the word `kernel`,
    and with C++'s literals: a number without suffix is a float."""
    text = FUNCTION_CONSTANT.sub(r"extern \g<0>", text)
    text = KERNEL.sub("", ATTRIBUTE.sub(lambda match: "\n" * match[0].count("\n"), text))
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if not line.startswith("#") and '"' not in line:
            line = NUMBER.sub(lambda match: msl_reader.literal(match[0]), line)
            lines[i] = VECTOR.sub(r"metal::typing_vector<\g<arguments>>::of", line)
    return "\n".join(lines)


def _findings(stderr: str) -> list[Finding]:
    errors: list[tuple[re.Match[str], list[re.Match[str]]]] = []
    for diagnostic in filter(None, map(DIAGNOSTIC.match, stderr.splitlines())):
        if diagnostic["kind"] != "note":
            errors.append((diagnostic, []))
        elif errors:
            errors[-1][1].append(diagnostic)
    findings: dict[tuple[str, str, str], Finding] = {}  # one for all instances of a template
    for error, notes in errors:
        texts = [note["text"] for note in notes]
        if not _is_struct_copy(error["text"], texts):
            # What the prelude's templates find is the fault of whoever uses them.
            place = next((one for one in [error, *notes] if one["file"] != str(PRELUDE)), error)
            message = in_metals_words("\n  ".join([error["text"], *_hints(texts), *texts[:3]]))
            finding = Finding(relative(place["file"]), int(place["line"]), message)
            findings.setdefault((finding.file, place["line"], error["text"]), finding)
    return list(findings.values())


def _hints(notes: list[str]) -> list[str]:
    """What to do, where clang's own words do not say it."""
    return [hint for pattern, hint in HINTS if any(pattern.match(note) for note in notes)]


def _is_struct_copy(text: str, notes: list[str]) -> bool:
    """Metal copies plain structs between address spaces; C++ has no copy constructor or assignment for that."""
    return bool(STRUCT_COPY.match(text) and notes and all(STRUCT_COPY_NOTE.match(note) for note in notes))


def in_metals_words(text: str) -> str:
    """A message of clang's with the address spaces and the language called what they are called in Metal."""
    for pattern, replacement in WORDS:
        text = pattern.sub(replacement, text)
    return text


def relative(file: str) -> str:
    """The path of a file of this repository from its root; others as they are."""
    path = Path(file).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else file
