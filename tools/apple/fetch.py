"""Brings what a build for macOS needs onto a machine that is none: wheels, through pip, kept in one folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

# What the check was last run with. PyTorch is the version that the tests run with (constraints.txt).
ZIG = "ziglang==0.17.0"
METAL_CPP = "mlx-metal==0.32.4"
TORCH = "torch==2.13.0"
PYOBJC = "pyobjc-framework-Metal==12.2.2"

PYTHON_VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
# From the oldest system that the product runs on to the newest a wheel may have been tagged with: for headers, newer
# is as good.
MAC_PLATFORMS = ["macosx_11_0_arm64", "macosx_12_0_arm64", "macosx_13_0_arm64", "macosx_14_0_arm64"]
MAC_PLATFORMS += ["macosx_10_9_universal2", "macosx_11_0_universal2"]


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)} failed:\n{done.stderr.strip()}")


def download(requirement: str, wheels: Path) -> Path:
    """The macOS wheel of `requirement` for this Python's version, downloaded unless it is there."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_').lower()}-{version}-*.whl"

    def found() -> list[Path]:
        tags = (f"cp{PYTHON_VERSION.replace('.', '')}-", "-py3-")
        return [one for one in wheels.glob("*.whl") if one.match(pattern) and any(tag in one.name for tag in tags)]

    if not found():
        print(f"check-apple: downloading {requirement} for macOS", flush=True)
        platforms = [word for one in MAC_PLATFORMS for word in ("--platform", one)]
        fixed = ("--no-deps", "--only-binary=:all:", "--python-version", PYTHON_VERSION)
        pip("download", "--quiet", "--dest", str(wheels), *fixed, *platforms, requirement)
    return found()[0]


def unpack(wheel: Path, folder: Path, wanted: tuple[str, ...]) -> Path:
    """The parts of a wheel whose names begin with one of `wanted`, in `folder`; kept for the next time."""
    done = folder / f".{wheel.name}"
    if not done.exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])
        done.touch()
    return folder


def zig(folder: Path) -> Path:
    """The zig program of the ziglang package, for this machine."""
    program = folder / "ziglang" / "zig"
    marker = folder / f".{ZIG}"
    if not marker.exists():
        print(f"check-apple: downloading {ZIG}", flush=True)
        pip("install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder), ZIG)
        marker.touch()
    return program
