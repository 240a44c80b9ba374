"""The stand-in's `Foundation.hpp` and `Metal.hpp` declare nothing that Apple's metal-cpp does not: every class with the
same bases, every method and function with the same signature, every enumerator with the same value.

One rule lies between them (tools/metal_cpp/declarations.py): where metal-cpp takes a block, the stand-in takes a
std::function, because the host's compilers have no blocks.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = [ROOT / "csrc" / "sim" / "include" / name for name in ("Foundation/Foundation.hpp", "Metal/Metal.hpp")]

sys.path.insert(0, str(ROOT / "tools"))
from metal_cpp import fetch  # noqa: E402
from metal_cpp.declarations import Declarations, missing, parse, read  # noqa: E402


@pytest.fixture(scope="module")
def metal_cpp() -> Declarations:
    try:
        folder = fetch.folder()
    except fetch.FetchError as error:
        if os.environ.get("METAL_MOE_OFFLINE"):
            pytest.skip(f"{error} (METAL_MOE_OFFLINE is set)")
        pytest.fail(f"{error}; name metal-cpp's folder in METAL_CPP_DIR, or set METAL_MOE_OFFLINE=1 to do without")
    return read([*sorted(folder.glob("Foundation/NS*.hpp")), *sorted(folder.glob("Metal/MTL*.hpp"))])


def stand_in_with(old: str, new: str) -> Declarations:
    """The stand-in's declarations after a change in the text of its headers."""
    texts = [path.read_text() for path in STAND_IN]
    assert sum(text.count(old) for text in texts) >= 1, f"the headers do not hold `{old}`"
    declarations = Declarations()
    for text in texts:
        parse(text.replace(old, new, 1), declarations)
    return declarations


def test_everything_that_the_stand_in_declares_is_in_metal_cpp(metal_cpp: Declarations) -> None:
    stand_in = read(STAND_IN)
    assert stand_in.count() >= 200
    assert metal_cpp.count() >= 5000
    for name in ("MTL::Device", "MTL::ComputeCommandEncoder", "NS::String", "NS::SharedPtr"):
        assert ("class", name) in stand_in.found
        assert ("class", name) in metal_cpp.found
    problems = missing(stand_in, metal_cpp)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("old", "new", "reported"),
    [
        (
            "NS::UInteger allocatedSize() const;",
            "NS::UInteger allocatedSize();",
            "method MTL::Allocation::allocatedSize",
        ),
        ("void* contents();", "const void* contents();", "method MTL::Buffer::contents"),
        ("NS::Array* functionNames() const;", "NS::Array* functionName() const;", "method MTL::Library::functionName:"),
        (
            "newFunction(const NS::String* functionName)",
            "newFunction(NS::String* n)",
            "method MTL::Library::newFunction",
        ),
        (
            "setBufferOffset(NS::UInteger offset, NS::UInteger index)",
            "setBufferOffset(uint32_t o, NS::UInteger i)",
            "Offset",
        ),
        ("static Array* array();", "Array* array();", "method NS::Array::array"),
        (
            "newLibrary(const NS::String* filepath, NS::Error** error)",
            "newLibrary(const NS::String* filepath)",
            "newLibrary",
        ),
        ("dispatchThreadgroups(Size threadgroupsPerGrid,", "dispatchThreadgroups(const Size& grid,", "dispatchThread"),
        ("const std::function<void(void*, NS::UInteger)>& deallocator", "std::function<void(void*)> f", "newBuffer"),
        ("StorageModePrivate = 2", "StorageModePrivate = 3", "value MTL::StorageModePrivate"),
        (
            "ResourceStorageModePrivate = 1 << 5",
            "ResourceStorageModePrivate = 1 << 6",
            "value MTL::ResourceStorageMode",
        ),
        ("enum LibraryError : NS::UInteger", "enum LibraryError : uint32_t", "enum MTL::LibraryError"),
        ("using ResourceOptions = NS::UInteger", "using ResourceOptions = uint32_t", "alias MTL::ResourceOptions"),
        (
            "class Buffer : public NS::Referencing<Buffer, Resource>",
            "class Buffer : public NS::Referencing<Buffer>",
            "class",
        ),
        ("class Function : public", "class Fonction : public", "MTL::Fonction"),
        (
            "Device* CreateSystemDefaultDevice();",
            "const Device* CreateSystemDefaultDevice();",
            "function MTL::CreateSystem",
        ),
        ("explicit operator bool() const", "operator bool()", "method NS::SharedPtr::operator bool"),
        ("SharedPtr(std::nullptr_t) noexcept", "SharedPtr(std::nullptr_t)", "method NS::SharedPtr::SharedPtr"),
        ("NS::UInteger width;", "uint32_t width;", "member MTL::Size::width"),
    ],
)
def test_wrong_declaration_is_noticed(metal_cpp: Declarations, old: str, new: str, reported: str) -> None:
    problems = missing(stand_in_with(old, new), metal_cpp)
    assert problems
    assert all(re.search(re.escape(reported), problem) for problem in problems), "\n".join(problems)


@pytest.mark.parametrize(
    ("stand_in", "real", "same"),
    [
        ("class A { public: int f(int x) const; };", "class A { public: int f(int) const { return 1; } };", True),
        ("class A { public: B* f(const NS::S* s); };", "class B; class A { public: class B* f(const S* pS); };", True),
        ("class A { public: int f(); };", "class A { int f(); };", False),
        ("class A { public: int f(); };", "class A { public: int g(); protected: int f(); };", False),
        ("class A { int f(); };", "class A {};", True),
        ("struct A { int x; };", "struct A { int x; } _MTL_PACKED;", True),
        ("struct A { int x; };", "class A { public: int x; };", False),
        ("enum E : NS::UInteger { a = 1, b };", "_MTL_ENUM(NS::UInteger, E) { a = 1, c = 5, b = 2 };", True),
        ("enum E : NS::UInteger { a = 1, b };", "_MTL_ENUM(NS::UInteger, E) { a = 1, c, b };", False),
        ("using O = UInteger; enum : O { a = 1 << 3 };", "_MTL_OPTIONS(NS::UInteger, O) { x = 4, a = x << 1 };", True),
        ("template <class C> struct P { P(const P& o); };", "template <class T> struct P { P(const P<T>&); };", True),
        ("template <class C> C* f(C* c);", "template <class T> T* f(T*) { return nullptr; }", True),
        ("template <class C> C* f(C* c);", "template <class T> T f(T*);", False),
        ("void f(const std::function<void(int, A*)>& done);", "void f(void (^done)(int x, A* a));", True),
        ("void f(const std::function<void(int, A*)>& done);", "void f(void (^done)(int x, B* a));", False),
        ("A(int x = 3);", "A(int);", True),
        ("int f(unsigned long);", "int f(unsigned long n);", True),
        ("bool operator==(A a, A b) { return true; } int f();", "int f(); bool operator==(A, A);", True),
    ],
)  # fmt: skip
def test_spelling(stand_in: str, real: str, same: bool) -> None:
    problems = missing(parse(f"namespace MTL {{ {stand_in} }}"), parse(f"namespace MTL {{ {real} }}"))
    assert (problems == []) == same, problems
