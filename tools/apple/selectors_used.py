"""Finds the Objective-C selectors and classes that our code names itself, and looks them up in tables of Apple's API.

The compiler says which: every selector of a message written as `[receiver selector]` or `@selector(...)` is a string of
the section __objc_methname, every class a symbol _OBJC_CLASS_$_NAME. Names given to the run time as C strings are found
in the sources. What goes through metal-cpp is in neither place: its tables are Apple's own.
"""

from __future__ import annotations

import re
from pathlib import Path

from macho import MachO

# Selectors that are in no table, and why they are known to exist.
EXTRA = {"bytes": "NSData has had it since Mac OS X 10.0; metal-cpp's Data declares NSMutableData's mutableBytes alone"}

CLASS_SYMBOL = "_OBJC_CLASS_$_"
STUB_SYMBOL = "_objc_msgSend$"

_SELECTOR_CALL = re.compile(r'\b(?:sel_registerName|sel_getUid|NSSelectorFromString)\s*\(\s*@?"([^"]+)"')
_CLASS_CALL = re.compile(
    r"\b(?:objc_getClass|objc_lookUpClass|objc_getRequiredClass|objc_getProtocol|NSClassFromString|NSProtocolFromString)"
    r'\s*\(\s*@?"([^"]+)"'
)


def of_extension(extension: MachO) -> tuple[set[str], set[str]]:
    """Selectors and classes in the compiled code."""
    stubs = {one.removeprefix(STUB_SYMBOL) for one in extension.undefined if one.startswith(STUB_SYMBOL)}
    selectors = extension.selectors | stubs
    classes = {one.removeprefix(CLASS_SYMBOL) for one in extension.undefined if one.startswith(CLASS_SYMBOL)}
    return selectors, classes


def of_sources(folder: Path) -> tuple[set[str], set[str]]:
    """Selectors and classes that sources look up by name at run time."""
    selectors: set[str] = set()
    classes: set[str] = set()
    for path in folder.rglob("*"):
        if path.suffix in (".cpp", ".mm", ".h"):
            text = path.read_text()
            selectors.update(_SELECTOR_CALL.findall(text))
            classes.update(_CLASS_CALL.findall(text))
    return selectors, classes


def known(metal_cpp: Path, pyobjc: Path) -> tuple[set[str], set[str]]:
    """Every selector and class (or protocol) in metal-cpp's tables and in PyObjC's metadata of Metal."""
    selectors: set[str] = set()
    classes: set[str] = set()
    for path in metal_cpp.rglob("*.hpp"):
        text = path.read_text()
        selectors.update(re.findall(r'_PRIVATE_DEF_SEL\(\s*\w+,\s*"([^"]+)"', text))
        classes.update(re.findall(r"_PRIVATE_DEF_(?:CLS|PRO)\(\s*(\w+)\s*\)", text))
    metadata = (pyobjc / "_metadata.py").read_text()
    for name, selector in re.findall(r'\br\(\s*b"(\w+)",\s*b"([\w:]+)"', metadata):
        classes.add(name)
        selectors.add(selector)
    return selectors | EXTRA.keys(), classes


def check(extension: MachO, sources: Path, metal_cpp: Path, pyobjc: Path) -> tuple[int, list[str]]:
    """How many names our code uses, and those that are in none of the tables."""
    selectors, classes = (a | b for a, b in zip(of_extension(extension), of_sources(sources), strict=True))
    known_selectors, known_classes = known(metal_cpp, pyobjc)
    missing = [f"selector '{one}'" for one in sorted(selectors - known_selectors)]
    missing += [f"class '{one}'" for one in sorted(classes - known_classes)]
    return len(selectors) + len(classes), missing
