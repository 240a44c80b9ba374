"""The check finds what it is for: each test plants one mistake, in the real build or in the real tools' output.

Run by `make check-apple` after the check itself, in the same folder of downloads and builds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(TOOLS), str(TOOLS / "apple")]

import check_apple  # noqa: E402 (its folder comes first)
import macho  # noqa: E402
import sdk  # noqa: E402
import selectors_used  # noqa: E402

BUILD = Path(os.environ.get("METAL_MOE_APPLE_BUILD", check_apple.ROOT / "build" / "apple"))


@pytest.fixture(scope="module")
def world() -> check_apple.World:
    return check_apple.prepare(BUILD)


def run_check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / "check_apple.py"), "--build", str(BUILD), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def compiler(world: check_apple.World, *arguments: object) -> subprocess.CompletedProcess:
    command = [str(world.sdk / "bin" / "c++"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def library(world: check_apple.World, folder: Path, text: str, *link: str) -> Path:
    """A shared object of one source, as the extension is linked; its own name is `_planted`."""
    source = folder / "planted.mm"
    source.write_text(text + '\nextern "C" __attribute__((visibility("default"))) void PyInit__planted() {}\n')
    result = folder / "_planted.so"
    flags = ["-x", "objective-c++", "-std=c++20", "-O2", "-isystem", world.metal_cpp]
    done = compiler(world, *flags, "-c", source, "-o", folder / "planted.o")
    assert done.returncode == 0, done.stderr
    torch = [world.torch / "lib" / name for name in check_apple.TORCH_LIBRARIES]
    link = ("-Wl,-undefined,dynamic_lookup", *link)
    done = compiler(
        world, "-bundle", "-o", result, folder / "planted.o", *torch, "-framework", "Metal", "-lobjc", *link
    )
    assert done.returncode == 0, done.stderr
    return result


def test_an_undefined_symbol_fails_the_check(world, tmp_path):
    """In the extension itself, linked with one object more."""
    source = tmp_path / "planted.cpp"
    source.write_text(
        'extern "C" int no_library_exports_this();\n'
        '__attribute__((visibility("default"), used)) int planted() { return no_library_exports_this(); }\n'
    )
    assert compiler(world, "-O2", "-c", source, "-o", tmp_path / "planted.o").returncode == 0
    try:
        done = run_check(f"--cmake=-DCMAKE_MODULE_LINKER_FLAGS={tmp_path / 'planted.o'}")
    finally:
        restored = run_check("--cmake=-DCMAKE_MODULE_LINKER_FLAGS=")
    assert done.returncode == 1
    assert "undefined symbols that nothing exports:\n  _no_library_exports_this (from Python)" in done.stderr
    assert restored.returncode == 0, restored.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('#include "no_such_header.h"', "no_such_header.h"),
        ("#include <Metal/Metal.hpp>\ninline void f(MTL::Device* d) { d->newNonsense(); }", "newNonsense"),
        ("inline int f() { int unused; return 1; }", "unused variable"),
    ],
)
def test_a_compile_error_fails_the_check(world, tmp_path, text, message):
    """In the product's own build: every source begins with one mistake more."""
    check_apple.configure(world, BUILD / "planted", ["-DCMAKE_OBJCXX_FLAGS="])  # the compiler itself works
    header = tmp_path / "planted.h"
    header.write_text(text + "\n")
    done = run_check("--name", "planted", f"--cmake=-DCMAKE_OBJCXX_FLAGS=-include {header}")
    assert done.returncode == 1
    assert "compiling and linking for macOS failed" in done.stderr and message in done.stderr


def test_a_source_that_is_not_compiled_fails_the_check(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "forgotten.mm").write_text("")
    monkeypatch.setattr(check_apple, "ROOT", tmp_path)
    (tmp_path / "compile_commands.json").write_text("[]")
    with pytest.raises(check_apple.CheckError, match="not compiled for macOS: csrc/forgotten.mm"):
        check_apple.check_sources(tmp_path)


def test_symbols_go_to_the_library_that_exports_them(world, tmp_path):
    text = """
#include <unistd.h>
#include <stdexcept>
#include <objc/message.h>
namespace at::mps { class MPSStream; MPSStream* getCurrentMPSStream(); }
extern "C" void* PyList_New(long);
extern "C" void* MTLCreateSystemDefaultDevice();
void* use() {
  getpid();
  (void)objc_msgSend;
  if (!MTLCreateSystemDefaultDevice()) throw std::runtime_error("");
  return at::mps::getCurrentMPSStream() ? PyList_New(0) : (void*)&objc_msgSend;
}"""
    extension = check_apple.check_extension(world, library(world, tmp_path, text))
    found, unknown = check_apple.attribute(world, extension)
    assert unknown == []
    names = {symbol: library for library, symbols in found.items() for symbol in symbols}
    assert names["_getpid"] == "/usr/lib/libSystem.B.dylib"
    assert names["_PyList_New"] == "Python"
    assert names["_objc_msgSend"] == "/usr/lib/libobjc.A.dylib"
    assert names["__ZN2at3mps19getCurrentMPSStreamEv"] == "@rpath/libtorch_cpu.dylib"
    assert names["_MTLCreateSystemDefaultDevice"].endswith("/Metal")
    assert names["__ZNSt13runtime_errorC1EPKc"] == "/usr/lib/libc++.1.dylib"


@pytest.mark.parametrize(
    ("declaration", "symbol"),
    [
        ('extern "C" void PyList_NoSuchFunction();', "PyList_NoSuchFunction"),
        ("namespace at::mps { void noSuchFunction(); } using at::mps::noSuchFunction;", "noSuchFunction"),
        ('extern "C" void MTLNoSuchFunction();', "MTLNoSuchFunction"),
    ],
)
def test_names_that_only_look_right_are_unknown(world, tmp_path, declaration, symbol):
    path = library(world, tmp_path, f"{declaration}\nvoid use() {{ {symbol}(); }}")
    with pytest.raises(check_apple.CheckError, match=f"nothing exports:\n.*{symbol}"):
        check_apple.check_extension(world, path)


def test_symbols_of_newer_systems_must_be_weak(world, tmp_path):
    """MTLTensorDomain came with macOS 26: imported strongly, it would keep the extension from loading on macOS 14."""
    text = 'extern "C" const void* const MTLTensorDomain%s; const void* use() { return &MTLTensorDomain; }'
    path = library(world, tmp_path, text % "")
    with pytest.raises(check_apple.CheckError, match="not imported weakly:\n.*MTLTensorDomain"):
        check_apple.check_extension(world, path)
    check_apple.check_extension(world, library(world, tmp_path, text % " __attribute__((weak_import))"))


def test_an_unknown_selector_or_class_is_found(world, tmp_path):
    text = """
@protocol Planted
- (void)endEncoding;
- (void)noSuchSelectorAnywhere:(int)value;
@end
void use(id<Planted> object) {
  [object endEncoding];
  [object noSuchSelectorAnywhere:1];
}"""
    extension = macho.read(library(world, tmp_path, text))
    selectors, _ = selectors_used.of_extension(extension)
    assert selectors == {"endEncoding", "noSuchSelectorAnywhere:"}
    used, missing = selectors_used.check(extension, tmp_path / "none", world.metal_cpp, world.pyobjc)
    assert used == 2 and missing == ["selector 'noSuchSelectorAnywhere:'"]


def test_names_looked_up_at_run_time_are_found(world, tmp_path):
    path = library(world, tmp_path, "")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "planted.cpp").write_text(
        'auto a = sel_registerName("commit"); auto b = sel_registerName("noSuch:selector:");\n'
        'auto c = objc_getClass("MTLCaptureManager"); auto d = NSClassFromString(@"MTLNoSuchClass");\n'
    )
    used, missing = selectors_used.check(macho.read(path), tmp_path / "csrc", world.metal_cpp, world.pyobjc)
    assert used == 4
    assert missing == ["selector 'noSuch:selector:'", "class 'MTLNoSuchClass'"]


def test_another_minimum_system_fails_the_check(world, tmp_path, monkeypatch):
    path = library(world, tmp_path, "")
    monkeypatch.setattr(sdk, "MINIMUM_MACOS", "13.0")
    with pytest.raises(check_apple.CheckError, match="wants macOS"):
        check_apple.check_extension(world, path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "elf.so"
    path.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(ValueError, match="no 64-bit Mach-O file"):
        macho.read(path)


def test_pytorch_is_the_one_that_tests_run_with():
    constraints = (check_apple.ROOT / "constraints.txt").read_text().splitlines()
    assert check_apple.fetch.TORCH in [line.split(";")[0].strip() for line in constraints]
