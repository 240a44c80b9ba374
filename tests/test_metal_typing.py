"""Every `.metal` source obeys Metal's typing rules, as far as clang can tell without Apple's compiler.

The engines of the stand-in have one address space, so they accept a pointer that drops `device`. Here clang reads the
same sources with real address spaces (`metal_typing/prelude.h`), in the dialect of C++ that Metal has. Two rules are
checked: types, address spaces included; and that constants of program scope stand in the constant address space.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRELUDE = ROOT / "tests" / "metal_typing" / "prelude.h"
SOURCES = sorted((ROOT / "kernels").rglob("*.metal"))
HEADERS = sorted((ROOT / "kernels").rglob("*.h"))
INCLUDES = [
    ROOT / "kernels",
    ROOT / "csrc" / "sim" / "msl" / "scan",
]  # scan/: empty headers for metal_stdlib and friends
FLAGS = [
    *("-x", "c++", "-std=c++14", "-nostdinc", "-target", "x86_64-unknown-linux-gnu", "-D__METAL_VERSION__=310"),
    *("-ferror-limit=0", "-fno-caret-diagnostics", "-Wno-c++17-extensions"),  # Metal's clang has `if constexpr` as well
    *("-Wno-undefined-inline", "-Wno-undefined-internal", "-Wno-return-type"),  # the prelude only declares
]
DIAGNOSTIC = re.compile(r"^(?P<place>\S+?:\d+:\d+): (?P<kind>fatal error|error|warning|note): (?P<text>.*)$")
# Metal copies plain structs between address spaces; C++ has no copy constructor or assignment for that.
STRUCT_COPY = re.compile(r"^(no matching constructor for initialization of '|no viable overloaded '='$)")
STRUCT_COPY_NOTE = re.compile(
    r"^candidate (constructor|function) \(the implicit (copy|move) \w+( \w+)?\) not viable: .*address space"
    r"|^candidate constructor \(the implicit default constructor\) not viable"
    r"|^in instantiation of "
)
NODE = re.compile(r"^(?P<tree>[ |`-]*)(?P<kind>\w+)")
FUNCTION = re.compile(r"Function(Template)?Decl|Method|Constructor|Conversion")


def find_clang() -> str | None:
    """The newest clang++ on the path; CLANGXX overrides it. bfloat needs 17 or later."""
    candidates = [os.environ.get("CLANGXX", ""), "clang++", *(f"clang++-{version}" for version in range(24, 16, -1))]
    for candidate in candidates:
        path = shutil.which(candidate) if candidate else None
        if path and _major_version(path) >= 17:
            return path
    return None


def _major_version(clang: str) -> int:
    text = subprocess.run([clang, "-dumpversion"], capture_output=True, text=True, check=False).stdout
    return int(text.split(".")[0] or 0)


@pytest.fixture(scope="module")
def clang() -> str:
    path = find_clang()
    if path is None:
        if os.environ.get("METAL_MOE_ALLOW_NO_CLANG"):
            pytest.skip("no clang++ of version 17 or later, which METAL_MOE_ALLOW_NO_CLANG allows")
        pytest.fail(
            "no clang++ of version 17 or later on the path: the Metal sources are not type-checked. Install one "
            "(Debian and Ubuntu: clang-19), name one in CLANGXX, or set METAL_MOE_ALLOW_NO_CLANG=1 to do without"
        )
    return path


def read_as_metal(clang: str, source: Path) -> str:
    """The preprocessed source, without attributes: C++ knows neither their names nor all their places."""
    command = [clang, *FLAGS, *(f"-I{folder}" for folder in INCLUDES), "-include", str(PRELUDE), "-E", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return re.sub(r"\[\[[^\[\]]*\]\]", "", done.stdout)


def type_errors(clang: str, text: str) -> list[str]:
    """Errors of the compiler, except that a plain struct cannot be copied between address spaces."""
    command = [clang, *FLAGS, "-fsyntax-only", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    errors: list[tuple[str, list[str]]] = []  # an error, and the texts of its notes
    in_error = False
    for line in done.stderr.splitlines():
        diagnostic = DIAGNOSTIC.match(line)
        if diagnostic is None:
            continue
        if diagnostic["kind"] == "note":
            if in_error:
                errors[-1][1].append(diagnostic["text"])
        else:
            in_error = diagnostic["kind"] != "warning"
            if in_error:
                errors.append((f"{diagnostic['place']}: {diagnostic['text']}", []))
    assert done.returncode == 0 or errors, done.stderr

    def is_struct_copy(error: str, notes: list[str]) -> bool:
        text = error.split(": ", 1)[1]
        return bool(STRUCT_COPY.match(text) and notes and all(STRUCT_COPY_NOTE.match(note) for note in notes))

    return ["\n  ".join([error, *notes]) for error, notes in errors if not is_struct_copy(error, notes)]


def globals_outside_constant(clang: str, text: str) -> list[str]:
    """Variables of program scope, and static members, that Metal would refuse."""
    command = [clang, *FLAGS, "-fsyntax-only", "-Xclang", "-ast-dump", "-fno-color-diagnostics", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    outside, ancestors = [], []
    for line in done.stdout.splitlines():
        node = NODE.match(line)
        if node is None:
            continue
        depth = len(node["tree"]) // 2
        ancestors[depth:] = [node["kind"]]
        local = any(FUNCTION.search(kind) for kind in ancestors[:-1])
        if node["kind"] == "VarDecl" and not local and "address_space(2)" not in line:
            outside.append(line)
    return outside


def unqualified_pointers(text: str) -> list[str]:
    """Declarations of pointers and references without an address space, which Metal demands of each of them.

    Relies on clang-format, which tells `T* pointer` from `a * product`.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/|\[\[[^\[\]]*\]\]", "", text, flags=re.DOTALL)
    found = []
    for star in re.finditer(r"(?<=[\w>])(?:[*&]+(?=[ ,)>(\w])| \([*&](?=\w+\)\[))", text):
        start, depth = star.start(), 0
        while start > 0:
            character = text[start - 1]
            if depth == 0 and character in ",(<;{}":
                break
            depth += {">": 1, ")": 1, "<": -1, "(": -1}.get(character, 0)
            start -= 1
        if not re.search(r"\b(device|constant|threadgroup|thread|operator)\b", text[start : star.end()]):
            line = text.count("\n", 0, star.start()) + 1
            found.append(f"line {line}: {' '.join(text[start : star.end() + 20].split())}")
    return found


def test_there_are_sources() -> None:
    assert len(SOURCES) >= 6


@pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])
def test_source_obeys_metal_typing(clang: str, source: Path) -> None:
    text = read_as_metal(clang, source)
    errors = type_errors(clang, text)
    assert not errors, "\n".join(errors)
    outside = globals_outside_constant(clang, text)
    assert not outside, "constants of program scope need `constant` (SHARED_CONSTANT in shared headers):\n" + "\n".join(
        outside
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("float first(float* p) { return *p; } float bad(device float* p) { return first(p); }", "address space"),
        ("void bad(device float* p) { float* q = p; }", "cannot initialize"),
        ("void bad(device float* p, threadgroup float* q) { q = p; }", "address space"),
        ("void bad(device uint* p) { device float* q = p; }", "cannot initialize"),
        ("float bad(float x) { return no_such_function(x); }", "undeclared"),
        ("uint bad(uint a, int b) { return min(a, b); }", "no matching function"),
        ("ulong bad(bool b) { return simd_ballot(b); }", "no viable conversion"),
        ("struct S { uint a; S(uint); }; void bad(device S* p) { S s = p; }", "no viable conversion"),
    ],
)
def test_check_finds_wrong_types(clang: str, tmp_path: Path, body: str, message: str) -> None:
    source = tmp_path / "wrong.metal"
    source.write_text(f"using namespace metal;\n{body}\n")
    errors = type_errors(clang, read_as_metal(clang, source))
    assert len(errors) == 1
    assert re.search(message, errors[0])


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("constexpr uint WIDTH = 4;", True),
        ("constexpr constant uint WIDTH = 4;", False),
        ("struct S { static constexpr uint WIDTH = 4; };", True),
        ("struct S { static constexpr constant uint WIDTH = 4; };", False),
        ("namespace a { constexpr uint WIDTH = 4; }", True),
        ("uint f() { constexpr uint WIDTH = 4; return WIDTH; }", False),
    ],
)
def test_check_finds_globals_outside_constant(clang: str, tmp_path: Path, body: str, wrong: bool) -> None:
    source = tmp_path / "globals.metal"
    source.write_text(f"using namespace metal;\n{body}\n")
    text = read_as_metal(clang, source)
    assert type_errors(clang, text) == []
    assert len(globals_outside_constant(clang, text)) == wrong


@pytest.mark.parametrize("source", SOURCES + HEADERS, ids=[path.name for path in SOURCES + HEADERS])
def test_pointers_name_their_address_space(source: Path) -> None:
    found = unqualified_pointers(source.read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("float first(float* p);", True),
        ("float first(device float* p, const S& s);", True),
        ("float first(device const float* p, thread const S& s) { return p[0] * s.a; }", False),
        ("void sum(float (&values)[4]);", True),
        ("void sum(thread float (&values)[4]) { values[0] *= 2; }", False),
        ("auto p = reinterpret_cast<device const vec<T, 4>*>(from);", False),
        ("auto p = reinterpret_cast<vec<T, 4>*>(from);", True),
        ("uint both = a & b, product = a * b; bool c = a && b;", False),
    ],
)
def test_check_finds_unqualified_pointers(text: str, wrong: bool) -> None:
    assert len(unqualified_pointers(text)) == wrong


def test_plain_structs_may_be_copied(clang: str, tmp_path: Path) -> None:
    source = tmp_path / "copy.metal"
    source.write_text(
        "struct S { uint a; }; void good(device S* p, constant S& c) { S s = p[0]; p[1] = s; S t = c; }\n"
    )
    assert type_errors(clang, read_as_metal(clang, source)) == []
