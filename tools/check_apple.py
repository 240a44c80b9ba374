#!/usr/bin/env python3
"""Proves on Linux that the macOS side compiles and links, against what it will meet on a Mac.

    python tools/check_apple.py [--build FOLDER] [--name NAME] [--cmake ARGUMENT]...

1. Fetches, through pip, zig (a clang and linker for macOS), the macOS wheels of PyTorch and of MLX (metal-cpp), and
   PyObjC's metadata of Metal.
2. Builds the extension for arm64 and macOS 14 with the project's own CMake files: every source of csrc/ but those of
   other platforms, as Objective-C++.
3. Reads the result: architecture, minimum system, libraries, and every undefined symbol. Each must be exported by
   PyTorch's own libraries, by Python, or by a system library.
4. Looks up every Objective-C selector and class that the sources name themselves in metal-cpp's tables or PyObjC's.

Exit status 0 only if all of that holds. Needs CMake, ninja and pybind11. What it does not prove: that anything runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent / "apple"))

import fetch  # noqa: E402 (its folder comes first)
import macho  # noqa: E402
import sdk  # noqa: E402
import selectors_used  # noqa: E402

TOOLCHAIN = ROOT / "tools" / "apple" / "toolchain.cmake"
MODULE = f"_core.cpython-{sys.version_info[0]}{sys.version_info[1]}-darwin.so"
TORCH_LIBRARIES = ("libtorch_python.dylib", "libtorch_cpu.dylib", "libc10.dylib")
# Sources of other engines' platforms, beside csrc/sim.
LINUX_ONLY = ("bindings/cuda_stream.cpp", "bindings/host_memory.cpp", "core/caller_stream.cpp")
SYSTEM = ("/usr/lib/", "/System/Library/Frameworks/")


class CheckError(Exception):
    """What was wrong, for the last line of the output."""


@dataclass
class World:
    """Everything that a Mac would have and this machine fetched or made."""

    zig: Path
    torch: Path
    metal_cpp: Path
    pyobjc: Path
    sdk: Path
    torch_files: dict[str, macho.MachO]  # by install name
    system_exports: dict[str, set[str]]  # by install name
    perhaps_absent: set[str]  # symbols of system libraries that not every macOS from the minimum on has


def prepare(build: Path) -> World:
    build.mkdir(parents=True, exist_ok=True)
    wheels = build / "wheels"
    torch = fetch.unpack(
        fetch.download(fetch.TORCH, wheels), build / "torch", ("torch/include/", "torch/lib/", "torch/version.py")
    )
    mlx = fetch.unpack(
        fetch.download(fetch.METAL_CPP, wheels), build / "mlx", ("mlx/include/metal_cpp/", "mlx/lib/libmlx.dylib")
    )
    pyobjc = fetch.unpack(fetch.download(fetch.PYOBJC, wheels), build / "pyobjc", ("Metal/",))
    zig = fetch.zig(build / "zig")
    torch_files = [macho.read(path) for path in sorted((torch / "torch" / "lib").glob("*.dylib"))]
    evidence = [*torch_files, macho.read(mlx / "mlx" / "lib" / "libmlx.dylib")]
    exports = sdk.write(build / "sdk", zig, evidence)
    return World(
        zig,
        torch / "torch",
        mlx / "mlx" / "include" / "metal_cpp",
        pyobjc / "Metal",
        build / "sdk",
        {one.install_name: one for one in torch_files if one.path.name in TORCH_LIBRARIES},
        exports,
        sdk.only_weak(evidence),
    )


def run(command: list[str], what: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CheckError(f"{what} failed:\n{done.stdout.strip()[-6000:]}")
    return done.stdout


def project_version() -> str:
    return re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]


def configure(world: World, folder: Path, extra: list[str]) -> str:
    """Configures the project for macOS in `folder`; what CMake said."""
    import pybind11

    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}"]
    definitions = {
        "METAL_MOE_APPLE_SDK": world.sdk,
        "METAL_CPP_DIR": world.metal_cpp,
        "METAL_MOE_TORCH_DIR": world.torch,
        "METAL_MOE_METAL": "OFF",
        "CMAKE_COMPILE_WARNING_AS_ERROR": "ON",
        "SKBUILD_PROJECT_VERSION": project_version(),
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        "PYTHON_MODULE_EXTENSION": MODULE.removeprefix("_core"),
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    command += [f"-D{name}={value}" for name, value in definitions.items()]
    return run([*command, *extra], "configuring for macOS")


def build_extension(world: World, folder: Path, extra: list[str]) -> Path:
    """The extension, cross-built by the project's own CMake files."""
    configure(world, folder, extra)
    run(["cmake", "--build", str(folder)], "compiling and linking for macOS")
    return next(folder.rglob(MODULE))


def check_sources(folder: Path) -> int:
    """Every C++ and Objective-C++ source of the product was compiled, for arm64 and as Objective-C++."""
    commands = {Path(one["file"]): one["command"] for one in json.loads((folder / "compile_commands.json").read_text())}
    sources = [path for suffix in ("cpp", "mm") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    linux_only = {ROOT / "csrc" / one for one in LINUX_ONLY}
    sources = [path for path in sources if ROOT / "csrc" / "sim" not in path.parents and path not in linux_only]
    missing = [str(path.relative_to(ROOT)) for path in sources if path not in commands]
    if missing:
        raise CheckError(f"not compiled for macOS: {', '.join(sorted(missing))}")
    plain = [str(path.relative_to(ROOT)) for path in sources if "-x objective-c++" not in commands[path]]
    if plain:
        raise CheckError(f"not compiled as Objective-C++: {', '.join(sorted(plain))}")
    return len(sources)


def python_exports(symbol: str) -> bool:
    """Whether the interpreter exports the C function or variable. macOS writes an underscore before C names."""
    return symbol.startswith("_") and hasattr(ctypes.pythonapi, symbol[1:])


def libsystem_exports(zig: Path) -> set[str]:
    """Symbols in zig's copy of libSystem's stub, which lists those of every library that libSystem re-exports."""
    text = (zig.parent / "lib" / "libc" / "darwin" / "libSystem.tbd").read_text()
    lists = re.findall(r"symbols:\s*\[(.*?)\]", text, flags=re.DOTALL)
    return {word.strip(" \n'\"") for one in lists for word in one.split(",")}


def attribute(world: World, extension: macho.MachO) -> tuple[dict[str, list[str]], list[str]]:
    """Every undefined symbol under the library that exports it, and those that nothing exports."""
    libsystem = libsystem_exports(world.zig)
    found: dict[str, list[str]] = {}
    unknown = []
    for symbol, library in sorted(extension.undefined.items()):
        if library in world.torch_files:
            exported = symbol in world.torch_files[library].exports
        elif library == "/usr/lib/libSystem.B.dylib":
            exported = symbol in libsystem
        elif library:
            exported = symbol in world.system_exports.get(library, ())
        else:  # looked up at run time, in whatever is loaded: Python itself
            exported, library = python_exports(symbol), "Python"
        if exported:
            found.setdefault(library, []).append(symbol)
        else:
            unknown.append(f"{symbol} (from {library})")
    return found, unknown


def check_extension(world: World, path: Path) -> macho.MachO:
    """The extension as a Mac's loader will see it. CheckError where it would not load."""
    extension = macho.read(path)
    if extension.cpu != macho.CPU_ARM64 or extension.platform != macho.PLATFORM_MACOS:
        raise CheckError(f"{path.name} is not for macOS on arm64")
    minimum = tuple(map(int, sdk.MINIMUM_MACOS.split(".")))
    if extension.minimum_os != minimum:
        raise CheckError(f"{path.name} wants macOS {extension.minimum_os}, not {minimum}")
    strangers = [one for one in extension.libraries if not one.startswith(SYSTEM) and one not in world.torch_files]
    if strangers:
        raise CheckError(f"{path.name} loads {', '.join(strangers)}")
    _, unknown = attribute(world, extension)
    if unknown:
        raise CheckError("undefined symbols that nothing exports:\n  " + "\n  ".join(unknown))
    strong = sorted(set(extension.undefined) & world.perhaps_absent - extension.weak)
    if strong:
        raise CheckError("symbols that an older macOS may not have are not imported weakly:\n  " + "\n  ".join(strong))
    if f"_PyInit_{path.name.split('.')[0]}" not in extension.exports:
        raise CheckError(f"{path.name} exports no PyInit function")
    return extension


def check(build: Path, name: str, cmake: list[str]) -> Path:
    """Everything that is proven, in order; the extension. Its CMake folder is `build`/`name`."""
    start = time.monotonic()
    world = prepare(build)
    folder = build / name
    path = build_extension(world, folder, cmake)
    print(f"check-apple: {check_sources(folder)} sources compiled and linked to {path.name}")
    extension = check_extension(world, path)
    print(f"check-apple: {len(extension.undefined)} undefined symbols, by the library that exports them:")
    for library, symbols in sorted(attribute(world, extension)[0].items()):
        print(f"  {len(symbols):4} {library}")
    print(f"check-apple: macOS {'.'.join(map(str, extension.minimum_os))}, arm64, {len(extension.libraries)} libraries")
    used, missing = selectors_used.check(extension, ROOT / "csrc", world.metal_cpp, world.pyobjc)
    if missing:
        raise CheckError("not known to Metal or Foundation:\n  " + "\n  ".join(missing))
    print(f"check-apple: {used} Objective-C selectors and classes named without metal-cpp, none of them unknown")
    print(f"check-apple: passed in {time.monotonic() - start:.0f} s")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "apple", help="folder of all that is made here")
    parser.add_argument("--name", default="cmake", help="CMake's folder in it (default: cmake)")
    parser.add_argument("--cmake", action="append", default=[], metavar="ARGUMENT", help="for cmake's configuration")
    options = parser.parse_args()
    try:
        check(options.build.resolve(), options.name, options.cmake)
    except (CheckError, RuntimeError) as error:
        print(f"check-apple: FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
