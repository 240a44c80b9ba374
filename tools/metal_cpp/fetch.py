#!/usr/bin/env python3
"""Finds Apple's metal-cpp: in METAL_CPP_DIR, or in build/metal-cpp, where it is unpacked from the macOS wheel of the
package mlx-metal (its version: constraints.txt) when it is first asked for. Prints the folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "metal-cpp"
INSIDE = "mlx/include/metal_cpp/"
# The wheel for the oldest macOS that is supported.
PLATFORM = "macosx_14_0_arm64"


class FetchError(Exception):
    """The package index did not give the wheel, or the wheel does not hold metal-cpp."""


def folder() -> Path:
    """The folder that holds Metal/Metal.hpp."""
    named = os.environ.get("METAL_CPP_DIR")
    if named:
        if not (Path(named) / "Metal" / "Metal.hpp").exists():
            raise FetchError(f"METAL_CPP_DIR is {named}, which does not hold Metal/Metal.hpp")
        return Path(named)
    if not (FOLDER / "Metal" / "Metal.hpp").exists():
        _fetch()
    return FOLDER


def _fetch() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--platform", PLATFORM, "--dest", temporary]
        command += ["--constraint", str(ROOT / "constraints.txt"), "mlx-metal"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise FetchError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(INSIDE) and not name.endswith("/")]
            if f"{INSIDE}Metal/Metal.hpp" not in names:
                raise FetchError(f"{wheels[0].name} does not hold {INSIDE}Metal/Metal.hpp")
            # The last name written is the one that says that all are there.
            for name in sorted(names, key=lambda name: name.endswith("Metal/Metal.hpp")):
                target = FOLDER / name.removeprefix(INSIDE)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))


if __name__ == "__main__":
    try:
        print(folder())
    except FetchError as error:
        sys.exit(f"metal-cpp: {error}")
