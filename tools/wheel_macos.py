#!/usr/bin/env python3
"""Assembles a wheel for macOS on arm64 from the cross-built extension and the kernels' sources, and checks it.

    python tools/wheel_macos.py [--build FOLDER] [--output FOLDER]

The extension is that of tools/check_apple.py, which runs first. Metal's compiler exists on a Mac alone, so the wheel
carries the kernels as sources that are compiled when first used. Like the extension, the wheel is for one release of
PyTorch, and says so in its dependencies. Nothing in it has run.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import re
import shutil
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

import check_apple
import fetch  # beside check_apple's other modules, which it has put on the path
import sdk

ROOT = check_apple.ROOT
PACKAGE = "metal_moe"
PLATFORM = f"macosx_{sdk.MINIMUM_MACOS.replace('.', '_')}_arm64"
# zip has no time before 1980; one for all makes wheels comparable.
TIME = (1980, 1, 1, 0, 0, 0)


def tag() -> str:
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return f"{python}-{python}-{PLATFORM}"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def metadata(about: dict) -> str:
    release = ".".join(fetch.TORCH.split("==")[1].split(".")[:2])
    fields = [
        ("Metadata-Version", "2.4"),
        ("Name", about["name"]),
        ("Version", about["version"]),
        ("Summary", about["description"]),
        ("Keywords", ",".join(about["keywords"])),
        ("License-Expression", about["license"]),
        *(("License-File", one) for one in about["license-files"]),
        *(("Classifier", one) for one in about["classifiers"]),
        ("Requires-Python", about["requires-python"]),
        *(("Requires-Dist", one) for one in about["dependencies"] if not re.match(r"torch\b", one)),
        ("Requires-Dist", f"torch=={release}.*"),
        ("Description-Content-Type", "text/markdown"),
    ]
    return "".join(f"{name}: {value}\n" for name, value in fields) + "\n" + (ROOT / about["readme"]).read_text()


def files(build: Path, staging: Path) -> dict[str, bytes]:
    """Everything in the wheel but RECORD, by name."""
    about = project()
    install = ["cmake", "--install", str(build / "cmake"), "--component", "python", "--prefix", str(staging)]
    check_apple.run(install, "installing the extension")
    result = {str(path.relative_to(staging)): path.read_bytes() for path in staging.rglob("*") if path.is_file()}
    package = ROOT / "python" / PACKAGE
    for path in package.rglob("*.py"):
        result[f"{PACKAGE}/{path.relative_to(package)}"] = path.read_bytes()
    information = f"{PACKAGE}-{about['version']}.dist-info"
    scripts = "".join(f"{name} = {value}\n" for name, value in about["scripts"].items())
    result[f"{information}/METADATA"] = metadata(about).encode()
    result[f"{information}/entry_points.txt"] = f"[console_scripts]\n{scripts}".encode()
    result[f"{information}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: tools/wheel_macos.py\nRoot-Is-Purelib: false\nTag: {tag()}\n"
    ).encode()
    for name in about["license-files"]:
        result[f"{information}/licenses/{name}"] = (ROOT / name).read_bytes()
    return result


def digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def write(contents: dict[str, bytes], folder: Path) -> Path:
    about = project()
    path = folder / f"{PACKAGE}-{about['version']}-{tag()}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    record = f"{PACKAGE}-{about['version']}.dist-info/RECORD"
    lines = [f"{name},{digest(content)},{len(content)}\n" for name, content in sorted(contents.items())]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*sorted(contents.items()), (record, "".join([*lines, f"{record},,\n"]).encode())]:
            entry = zipfile.ZipInfo(name, TIME)
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return path


def wrong_with(path: Path, world: check_apple.World) -> list[str]:
    """What must not be so in the wheel."""
    wrong = []
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    if f"-{tag()}.whl" not in path.name:
        wrong.append(f"its name is {path.name}, not of tag {tag()}")
    for name in sorted(contents):
        for place in {str(ROOT), str(Path.home()), sys.prefix} - {"/", "/usr"}:
            if place.encode() in contents[name]:
                wrong.append(f"{name} holds this machine's path {place}")
    wrong += _wrong_with_extension(contents, path, world)
    wrong += _wrong_with_information(contents)
    return wrong


def _wrong_with_extension(contents: dict[str, bytes], path: Path, world: check_apple.World) -> list[str]:
    compiled = [name for name in contents if name.endswith((".so", ".dylib"))]
    if compiled != [f"{PACKAGE}/{check_apple.MODULE}"]:
        return [f"its compiled files are {compiled}"]
    wrong = []
    file = path.parent / check_apple.MODULE
    file.write_bytes(contents[compiled[0]])
    try:
        extension = check_apple.check_extension(world, file)
    except check_apple.CheckError as error:
        return [str(error)]
    finally:
        file.unlink()
    if extension.rpaths != ["@loader_path/../torch/lib"]:
        wrong.append(f"{compiled[0]} looks for libraries in {extension.rpaths}")
    if extension.install_name.startswith("/"):
        wrong.append(f"{compiled[0]} calls itself {extension.install_name}")
    if not extension.signed:
        wrong.append(f"{compiled[0]} has no code signature: arm64 Macs load none without")
    return wrong


def _wrong_with_information(contents: dict[str, bytes]) -> list[str]:
    wrong = []
    about = project()
    information = f"{PACKAGE}-{about['version']}.dist-info"
    said = Parser().parsestr(contents[f"{information}/METADATA"].decode())
    if (said["Name"], said["Version"]) != (about["name"], about["version"]):
        wrong.append(f"METADATA is of {said['Name']} {said['Version']}")
    build_record: dict = {}
    exec(contents[f"{PACKAGE}/_build.py"], build_record)  # our own, a few lines
    if f"torch=={'.'.join(build_record['TORCH_VERSION'].split('.')[:2])}.*" not in said.get_all("Requires-Dist"):
        wrong.append(f"METADATA does not require PyTorch {build_record['TORCH_VERSION']}, which it was built with")
    recorded = io.StringIO(contents[f"{information}/RECORD"].decode())
    listed = {line.rsplit(",", 2)[0]: line.rsplit(",", 2)[1] for line in recorded}
    if set(listed) != set(contents):
        wrong.append(f"RECORD and contents differ: {sorted(set(listed) ^ set(contents))}")
    wrong += [f"RECORD is wrong about {name}" for name, of in listed.items() if of and of != digest(contents[name])]
    sources = {Path(name).name for name in contents if name.startswith(f"{PACKAGE}/metal_moe.metallib/")}
    expected = {path.name for path in (ROOT / "kernels").glob("*/*.metal")}
    if sources != expected:
        wrong.append(f"its kernel sources are {sorted(sources)}, not {sorted(expected)}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "apple", help="folder of check_apple.py")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the wheel (default: dist)")
    options = parser.parse_args()
    build = options.build.resolve()
    try:
        check_apple.check(build, "cmake", [])
        staging = build / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        path = write(files(build, staging), options.output.resolve())
        wrong = wrong_with(path, check_apple.prepare(build))
    except (check_apple.CheckError, RuntimeError) as error:
        print(f"wheel-macos: FAILED: {error}", file=sys.stderr)
        return 1
    if wrong:
        print(f"wheel-macos: FAILED: {path.name}:\n  " + "\n  ".join(wrong), file=sys.stderr)
        return 1
    with zipfile.ZipFile(path) as archive:
        count = len(archive.namelist())
    print(f"wheel-macos: {path} ({path.stat().st_size / 1e6:.1f} MB, {count} files), checked; nothing in it has run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
