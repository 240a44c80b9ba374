"""The macOS wheel: what is in it, and that each thing which must not be so is found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(TOOLS), str(TOOLS / "apple")]

import check_apple  # noqa: E402 (its folder comes first)
import wheel_macos  # noqa: E402

BUILD = Path(os.environ.get("METAL_MOE_APPLE_BUILD", check_apple.ROOT / "build" / "apple"))
INFORMATION = f"metal_moe-{check_apple.project_version()}.dist-info"
EXTENSION = f"metal_moe/{check_apple.MODULE}"


@pytest.fixture(scope="module")
def world() -> check_apple.World:
    return check_apple.prepare(BUILD)


@pytest.fixture(scope="module")
def right(world, tmp_path_factory) -> dict[str, bytes]:
    """Contents of the wheel, of the extension that the check has built."""
    check_apple.build_extension(world, BUILD / "cmake", [])
    return wheel_macos.files(BUILD, tmp_path_factory.mktemp("staging"))


def wrong(world: check_apple.World, contents: dict[str, bytes], folder: Path) -> list[str]:
    return wheel_macos.wrong_with(wheel_macos.write(contents, folder), world)


def test_nothing_is_wrong_with_it(world, right, tmp_path):
    assert wrong(world, right, tmp_path) == []
    package = {str(path.relative_to(check_apple.ROOT / "python")) for path in _sources()}
    assert package <= set(right)
    assert {EXTENSION, "metal_moe/_build.py", f"{INFORMATION}/METADATA", f"{INFORMATION}/licenses/LICENSE"} <= set(
        right
    )


def _sources() -> list[Path]:
    return list((check_apple.ROOT / "python").rglob("*.py"))


def test_the_same_build_makes_the_same_wheel(right, tmp_path):
    first, second = (wheel_macos.write(right, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_its_name_says_where_it_runs(right, tmp_path):
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    name = wheel_macos.write(right, tmp_path).name
    assert name == f"metal_moe-{check_apple.project_version()}-{python}-{python}-macosx_14_0_arm64.whl"
    assert f"Tag: {python}-{python}-macosx_14_0_arm64".encode() in right[f"{INFORMATION}/WHEEL"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("metal_moe/device.py", lambda old: old + str(check_apple.ROOT).encode(), "holds this machine's path"),
        (
            EXTENSION,
            lambda old: old.replace(b"@loader_path/../torch/lib", b"/opt/somewhere/torch/lib\0"),
            "libraries in",
        ),
        (
            EXTENSION,
            lambda old: old.replace(b"/usr/lib/libobjc.A.dylib", b"/opt/lib/libobjc.A.dylib"),
            "loads /opt/lib",
        ),
        (EXTENSION, lambda old: b"\xcf\xfa\xed\xfe\x07" + old[5:], "is not for macOS on arm64"),
        ("metal_moe/other.dylib", lambda old: b"", "its compiled files are"),
        ("metal_moe/metal_moe.metallib/extra.metal", lambda old: b"", "its kernel sources are"),
        (
            f"{INFORMATION}/METADATA",
            lambda old: old.replace(b"Requires-Dist: torch==", b"Requires-Dist: torch=="[:-1] + b"~"),
            "METADATA does not require PyTorch",
        ),
        (f"{INFORMATION}/METADATA", lambda old: old.replace(b"\nVersion: ", b"\nVersion: 9."), "METADATA is of"),
    ],
)
def test_a_wrong_wheel_is_found(world, right, tmp_path, name, change, message):
    changed = change(right.get(name, b""))
    assert changed != right.get(name), "the change changes something"
    found = wrong(world, {**right, name: changed}, tmp_path)
    assert any(message in one for one in found), found


def test_a_wrong_record_is_found(world, right, tmp_path, monkeypatch):
    monkeypatch.setattr(wheel_macos, "digest", lambda content: "sha256=0")
    path = wheel_macos.write(right, tmp_path)
    monkeypatch.undo()
    assert "RECORD is wrong about metal_moe/__init__.py" in wheel_macos.wrong_with(path, world)
