"""`make check-msl` finds what breaks Metal's rules, and nothing else: each file in msl/bad breaks one rule, in the
lines that say so (`// error: what the message must match`), and its twin in msl/good keeps it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "check_msl.py"
BAD = sorted((ROOT / "tests" / "msl" / "bad").glob("*.metal"))
GOOD = sorted((ROOT / "tests" / "msl" / "good").glob("*.metal"))
EXPECTED = re.compile(r"// error: (?P<message>.*)$")

sys.path.insert(0, str(ROOT / "tools"))
from msl import clang as clang_module  # noqa: E402
from msl import house, tree  # noqa: E402


@pytest.fixture(scope="module")
def clang() -> str:
    try:
        return clang_module.find()
    except clang_module.ClangMissing as error:
        if os.environ.get("METAL_MOE_ALLOW_NO_CLANG"):
            pytest.skip(f"{error} (METAL_MOE_ALLOW_NO_CLANG is set)")
        pytest.fail(f"{error}, or set METAL_MOE_ALLOW_NO_CLANG=1 to do without")


def run(clang: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--clang", clang, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def findings(clang: str) -> dict[str, dict[int, list[str]]]:
    """What is found in the example files: file -> line -> messages."""
    done = run(clang, "--json", *(str(path) for path in BAD + GOOD))
    assert done.returncode == 1, done.stderr
    found: dict[str, dict[int, list[str]]] = {}
    for one in json.loads(done.stdout)["findings"]:
        found.setdefault(one["file"], {}).setdefault(one["line"], []).append(one["message"])
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_bad_file_has_a_good_twin() -> None:
    assert len(BAD) >= 31
    assert [path.name for path in BAD] == [path.name for path in GOOD]


@pytest.mark.parametrize("path", BAD, ids=[path.stem for path in BAD])
def test_broken_rule_is_found_where_it_is_broken(findings: dict, path: Path) -> None:
    lines = path.read_text().split("\n")
    expected = {i: match["message"] for i, line in enumerate(lines, 1) if (match := EXPECTED.search(line))}
    found = findings.get(name(path), {})
    assert expected
    assert set(found) == set(expected), json.dumps(found, indent=2)
    for line, pattern in expected.items():
        assert any(re.search(pattern, message) for message in found[line]), f"{name(path)}:{line}: {found[line]}"


@pytest.mark.parametrize("path", GOOD, ids=[path.stem for path in GOOD])
def test_twin_that_keeps_the_rule_passes(findings: dict, path: Path) -> None:
    assert findings.get(name(path), {}) == {}


def test_kernels_keep_every_rule(clang: str) -> None:
    done = run(clang)
    assert done.returncode == 0, done.stdout + done.stderr
    sources = len([*(ROOT / "kernels").rglob("*.metal"), *(ROOT / "tests" / "kernels").glob("*.metal")])
    assert sources >= 11
    assert f"{sources} sources, 0 errors" in done.stdout


def test_kernel_names_are_compared_across_the_sources_of_the_library(clang: str, tmp_path: Path) -> None:
    """The tool is run on a copy of itself, so that the second source with a kernel `combine` stands in its kernels/."""
    for part in ("kernels", "tools", "csrc/sim"):
        subprocess.run(["cp", "-r", "--parents", part, str(tmp_path)], cwd=ROOT, check=True)
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "kernels" / "moe" / "second.metal").write_text(
        '#include "combine.h"\n[[kernel]] void group(device uint* out [[buffer(0)]]) { out[0] = 0; }\n'
    )
    (tmp_path / "kernels" / "moe" / "alone.h").write_text("#pragma once\n")
    command = [sys.executable, "tools/check_msl.py", "--clang", clang]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(
        r"second.metal:2: error: a kernel is named 'group', as is that of kernels/moe/group.metal", done.stdout
    )
    assert "kernels/moe/alone.h:1: error: no .metal source includes this header" in done.stdout
    assert "2 errors" in done.stdout


def test_neither_reading_would_do_alone(clang: str, tmp_path: Path) -> None:
    """Why there are two (tools/msl/clang.py): what each accepts or refuses wrongly."""
    source = tmp_path / "readings.metal"
    beginning = "#include <metal_stdlib>\nusing namespace metal;\n"
    arrays = (
        "struct Row { float x[2]; };\nstruct Tile { Row rows[2]; };\n"
        "inline float f() { Tile t; t.rows[0].x[0] = 1.0f; return t.rows[0].x[0]; }\n"
    )

    def errors(language: list[str], text: str) -> list[str]:
        source.write_text(beginning + text)
        return [one.message for one in clang_module.read(clang, language, source).findings]

    # C++ for OpenCL with thread memory as the default, as in Metal up to 4.0, refuses arrays of structs as members.
    without_generic = ["-cl-ext=-all,+cl_khr_fp16" if "generic" in word else word for word in clang_module.OPENCL]
    assert any("default constructor" in message for message in errors(without_generic, arrays))
    assert errors(clang_module.OPENCL, arrays) == errors(clang_module.CXX14, arrays) == []
    # With the generic default it takes a member function of any object; C++14 does not.
    member = "struct C { uint n; void add() { ++n; } };\ninline void f(device C* c) { c->add(); }\n"
    assert errors(clang_module.OPENCL, member) == []
    assert len(errors(clang_module.CXX14, member)) == 1
    # C++14 knows no `thread`, so it cannot miss one; and none of OpenCL's restrictions.
    forgotten = (
        "inline float f(const float* p) { return p[0]; }\n"
        "inline double g(float x) { static double y = 1; return x + y; }\n"
    )
    assert errors(clang_module.CXX14, forgotten) == []
    source.write_text(beginning + forgotten)
    reading = clang_module.read(clang, clang_module.OPENCL, source)
    assert any("double" in one.message for one in reading.findings)
    assert any("without an address space" in one.message for one in tree.check(reading.tree))


def test_explained_32_is_allowed() -> None:
    assert house.check("uint x = 32; // 32: bits of a word\n#define SIMD_WIDTH 32\n// 32 threads\n", "file") == []
    found = house.check("uint a = 1;\nuint b = 32u, c = 320, d = 3.32f; // lanes\n", "file")
    assert [one.line for one in found] == [2]


def test_a_clang_that_is_missing_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "CLANGXX": ""}
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "clang++ of version 19 or later" in done.stderr
