"""How CMake builds the kernels on macOS, with a program in place of `xcrun metal` that notes what it is asked for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(TOOLS), str(TOOLS / "apple")]

import check_apple  # noqa: E402 (its folder comes first)

BUILD = Path(os.environ.get("METAL_MOE_APPLE_BUILD", check_apple.ROOT / "build" / "apple"))
SOURCES = sorted((check_apple.ROOT / "kernels").glob("*/*.metal"))

XCRUN = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
if {broken}:
    sys.exit("error: cannot execute tool 'metal' due to missing Metal Toolchain")
with open({log!r}, "a") as log:
    print(json.dumps(arguments), file=log)
pathlib.Path(arguments[arguments.index("-o") + 1]).write_text("made by metal")
"""


def configure(tmp_path: Path, broken: bool) -> tuple[Path, str, Path]:
    """CMake's folder, what it said, and the log of calls."""
    world = check_apple.prepare(BUILD)
    log, xcrun, folder = tmp_path / "log", tmp_path / "xcrun", tmp_path / "cmake"
    xcrun.write_text(XCRUN.format(python=sys.executable, broken=broken, log=str(log)))
    xcrun.chmod(0o755)
    extra = ["-DMETAL_MOE_METAL=ON", f"-DMETAL_MOE_XCRUN={xcrun}"]
    said = check_apple.configure(world, folder, extra)
    return folder, said, log


def build_kernels(folder: Path) -> None:
    check_apple.run(["cmake", "--build", str(folder), "--target", "metal_moe_kernels"], "building the kernels")


def test_metal_compiles_and_links_one_library(tmp_path):
    folder, said, log = configure(tmp_path, broken=False)
    assert "Kernels: compiled by" in said
    build_kernels(folder)
    library = folder / "metal_moe.metallib"
    assert library.read_text() == "made by metal"
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(call[:3] == ["-sdk", "macosx", "metal"] for call in calls)
    probe, *compiled, linked = calls
    assert len(compiled) == len(SOURCES)
    for call in [probe, *compiled]:
        flags = {"-std=metal3.1", "-O3", "-fno-fast-math", "-mmacosx-version-min=14.0", "-Wall", "-Wextra", "-Werror"}
        assert flags <= set(call), call
    assert {call[call.index("-c") + 1] for call in compiled} == {str(source) for source in SOURCES}
    objects = {call[call.index("-o") + 1] for call in compiled}
    assert objects <= set(linked) and linked[linked.index("-o") + 1] == str(library)


def test_a_library_is_one_file_of_the_wheel(tmp_path):
    folder, _, _ = configure(tmp_path, broken=False)
    installs = (folder / "cmake_install.cmake").read_text()
    assert 'TYPE FILE FILES "' + str(folder / "metal_moe.metallib") in installs


def test_sources_are_embedded_where_the_compiler_is_a_stub(tmp_path):
    """Xcode 26 and later, before its Metal toolchain is downloaded: `metal` is found and does not run."""
    folder, said, _ = configure(tmp_path, broken=True)
    said = " ".join(said.split())
    assert "Metal's compiler does not run (error: cannot execute tool 'metal' due to missing Metal Toolchain)" in said
    assert "xcodebuild -downloadComponent MetalToolchain" in said
    build_kernels(folder)
    texts = sorted((folder / "metal_moe.metallib").iterdir())
    assert [path.name for path in texts] == sorted(source.name for source in SOURCES)
    assert all(path.read_text().startswith("//! digest ") for path in texts)
    assert "TYPE DIRECTORY FILES" in (folder / "cmake_install.cmake").read_text()


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("-DMETAL_CPP_DIR=/nowhere", "metal-cpp is missing: '/nowhere/Metal/Metal.hpp' does not exist"),
        ("-DMETAL_MOE_TORCH_DIR=/nowhere", "PyTorch with its MPS headers is missing"),
    ],
)
def test_what_is_missing_is_named(tmp_path, definition, message):
    world = check_apple.prepare(BUILD)
    with pytest.raises(check_apple.CheckError) as caught:
        check_apple.configure(world, tmp_path / "cmake", [definition])
    assert message in " ".join(str(caught.value).split())
