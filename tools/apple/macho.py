"""Reads what a Mach-O file of one 64-bit architecture says of itself: libraries, symbols, minimum system."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

MAGIC_64 = 0xFEEDFACF
CPU_ARM64 = 0x0100000C
FILE_TYPES = {1: "object", 6: "dylib", 8: "bundle"}
PLATFORM_MACOS = 1

LC_SYMTAB = 0x2
LC_SEGMENT_64 = 0x19
LC_ID_DYLIB = 0xD
LC_UUID = 0x1B
LC_CODE_SIGNATURE = 0x1D
LC_RPATH = 0x8000001C
LC_DYLD_INFO = (0x22, 0x80000022)
LC_DYLD_EXPORTS_TRIE = 0x80000033
LC_BUILD_VERSION = 0x32
# Linked, linked weakly, re-exported, upward: the commands that number a file's libraries, in order.
LC_LOAD = (0xC, 0x80000018, 0x8000001F, 0x80000023)

N_EXT, N_TYPE, N_UNDEFINED, N_STAB = 0x01, 0x0E, 0x0, 0xE0
N_WEAK_REFERENCE = 0x40  # null where the system does not have it
# Library ordinals of undefined symbols that name no library.
THIS_IMAGE, DYNAMIC_LOOKUP, EXECUTABLE = 0, 0xFE, 0xFF


@dataclass
class MachO:
    path: Path
    file_type: str
    cpu: int
    install_name: str = ""
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    platform: int = 0
    minimum_os: tuple[int, int] = (0, 0)
    signed: bool = False
    undefined: dict[str, str] = field(default_factory=dict)
    """Undefined symbol -> install name of the library it is bound to; "" where any loaded one will do."""
    weak: set[str] = field(default_factory=set)
    exports: set[str] = field(default_factory=set)
    selectors: set[str] = field(default_factory=set)
    """Of Objective-C messages that the code sends."""


def read(path: Path) -> MachO:
    """Parses the file. ValueError where it is no 64-bit Mach-O file of a single architecture."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(path, data)


def _parse(path: Path, data: mmap.mmap) -> MachO:
    magic, cpu, _, file_type, commands, _, _, _ = struct.unpack_from("<8I", data)
    if magic != MAGIC_64:
        raise ValueError(f"{path}: no 64-bit Mach-O file (magic {magic:#x})")
    result = MachO(path, FILE_TYPES.get(file_type, str(file_type)), cpu)
    symbols = None
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command in LC_LOAD or command in (LC_ID_DYLIB, LC_RPATH):
            (offset,) = struct.unpack_from("<I", data, at + 8)
            text = data[at + offset : at + size].split(b"\0", 1)[0].decode()
            if command == LC_ID_DYLIB:
                result.install_name = text
            else:
                (result.rpaths if command == LC_RPATH else result.libraries).append(text)
        elif command == LC_BUILD_VERSION:
            result.platform, minimum = struct.unpack_from("<2I", data, at + 8)
            result.minimum_os = (minimum >> 16, minimum >> 8 & 0xFF)
        elif command == LC_CODE_SIGNATURE:
            result.signed = True
        elif command == LC_SEGMENT_64:
            _read_sections(result, data, at)
        elif command == LC_SYMTAB:
            symbols = struct.unpack_from("<4I", data, at + 8)
        elif command in LC_DYLD_INFO:
            result.exports |= _exports(data, *struct.unpack_from("<2I", data, at + 40))
        elif command == LC_DYLD_EXPORTS_TRIE:
            result.exports |= _exports(data, *struct.unpack_from("<2I", data, at + 8))
        at += size
    if symbols:
        _read_undefined(result, data, *symbols)
    return result


def _read_sections(result: MachO, data: mmap.mmap, segment: int) -> None:
    (count,) = struct.unpack_from("<I", data, segment + 64)
    for index in range(count):
        name, _, _, size, offset = struct.unpack_from("<16s16s2QI", data, segment + 72 + 80 * index)
        if name.rstrip(b"\0") == b"__objc_methname":
            result.selectors |= {one.decode() for one in data[offset : offset + size].split(b"\0") if one}


def _read_undefined(result: MachO, data: mmap.mmap, offset: int, count: int, names: int, _size: int) -> None:
    for index in range(count):
        name, kind, _, description, value = struct.unpack_from("<IBBHQ", data, offset + 16 * index)
        if kind & N_STAB or kind & N_TYPE != N_UNDEFINED or not kind & N_EXT or value:
            continue
        symbol = data[names + name : data.find(b"\0", names + name)].decode()
        ordinal = description >> 8
        named = THIS_IMAGE < ordinal <= len(result.libraries)
        result.undefined[symbol] = result.libraries[ordinal - 1] if named else ""
        if description & N_WEAK_REFERENCE:
            result.weak.add(symbol)


def _uleb(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _exports(data: mmap.mmap, offset: int, size: int) -> set[str]:
    """The names of an export trie: every node may end a symbol and has edges that go on from it."""
    trie = data[offset : offset + size]
    found: set[str] = set()
    pending = [(0, b"")] if size else []
    while pending:
        at, prefix = pending.pop()
        length, at = _uleb(trie, at)
        if length:
            found.add(prefix.decode())
        at += length
        edges = trie[at]
        at += 1
        for _ in range(edges):
            end = trie.index(b"\0", at)
            child, after = _uleb(trie, end + 1)
            pending.append((child, prefix + trie[at:end]))
            at = after
    return found
