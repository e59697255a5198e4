"""Links an ELF object for x86-64 into an *image*: code that runs at any address once it is loaded.

An image is the read-only sections of the object, a stub for each function of the C library or of Python, and a table of
those functions' addresses.  The loader also adds the address of the image to some words, its pointers.  Everything else
is relative to the instruction.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SECTION = np.dtype("u4,u4,u8,u8,u8,u8,u4,u4,u8,u8")
SECTION.names = ("name", "kind", "flags", "address", "offset", "bytes", "link", "info", "alignment", "entry")
SYMBOL = np.dtype("u4,u1,u1,u2,u8,u8")
SYMBOL.names = ("name", "info", "other", "section", "value", "bytes")
RELOCATION = np.dtype("u8,u4,u4,i8")
RELOCATION.names = ("place", "kind", "symbol", "addend")

PROGRAM, SYMBOLS, RELOCATIONS = 1, 2, 4
"""Kinds of sections."""
WRITABLE, LOADED = 1, 2
"""Flags of sections."""
RELATIVE, BY_TABLE, POINTER = (2, 4), (9, 41, 42), 1
"""Relocations: PC32 and PLT32; GOTPCREL, GOTPCRELX and REX_GOTPCRELX; 64."""
CONSTANT_POINTERS = ".data.rel.ro"
"""The section of constants with pointers, which only a linker writes."""
WORD = 8
JUMP = b"\xff\x25"
"""Jump to the address in a word at a distance that follows in 32 bits."""

Records = npt.NDArray[Any]


class LinkError(Exception):
    """An object needs something that images do not have."""


class Image(NamedTuple):
    """Code, the offsets of its function, its table and its pointers, and the names whose addresses are in the table."""

    code: bytes
    offset: int
    table: int
    pointers: list[int]
    externals: list[str]


def link(data: bytes, function: str) -> Image:
    """The image of an object with one function that others call."""
    sections = read_sections(data)
    symbols, externals = read_symbols(data, sections), read_externals(data)
    code, places = lay_out(data, sections)
    stubs, table = len(code), len(code) + WORD * len(externals)
    distance = table - stubs - len(JUMP) - 4  # from a stub's next instruction to its word, the same for all
    code += (JUMP + struct.pack("<ixx", distance)) * len(externals) + bytes(WORD * len(externals))
    offsets, in_stubs, in_table = dict[int, int](), dict[int, int](), dict[int, int]()
    for i, (name, symbol) in enumerate(symbols):
        if symbol["section"] in places:
            offsets[i] = in_stubs[i] = places[symbol["section"]] + int(symbol["value"])
        elif name in externals:
            in_stubs[i], in_table[i] = (at + WORD * externals.index(name) for at in (stubs, table))
    targets = {POINTER: offsets} | dict.fromkeys(RELATIVE, in_stubs) | dict.fromkeys(BY_TABLE, in_table)
    pointers = []
    for place, kind, number, addend in read_relocations(data, sections, places):
        if number not in targets.get(kind, ()):
            raise LinkError(f"{symbols[number][0] or 'a section'} with a relocation of kind {kind}")
        if kind == POINTER:
            pointers.append(place)
            struct.pack_into("<q", code, place, targets[kind][number] + addend)
        else:
            struct.pack_into("<i", code, place, targets[kind][number] + addend - place)
    (offset,) = [offsets[i] for i, (name, _) in enumerate(symbols) if name == function]
    return Image(bytes(code), offset, table, pointers, externals)


def read_externals(data: bytes) -> list[str]:
    """The names that an object uses and does not define."""
    return [name for name, symbol in read_symbols(data, read_sections(data)) if name and not symbol["section"]]


def read_sections(data: bytes) -> Records:
    """The section headers."""
    (begin, size, count) = struct.unpack_from("<Q10xHH", data, 40)
    if size != SECTION.itemsize:
        raise LinkError("no object of 64 bits")
    return np.frombuffer(data, SECTION, count, begin)


def read(data: bytes, section: Any, layout: np.dtype[Any]) -> Records:
    """The records of a section."""
    return np.frombuffer(data, layout, int(section["bytes"]) // layout.itemsize, int(section["offset"]))


def read_symbols(data: bytes, sections: Records) -> list[tuple[str, Any]]:
    """The symbols with their names."""
    (table,) = sections[sections["kind"] == SYMBOLS]
    texts = sections[table["link"]]
    return [(name_at(data, texts, each), each) for each in read(data, table, SYMBOL)]


def name_at(data: bytes, texts: Any, named: Any) -> str:
    """The name of a symbol or section in a section of texts."""
    begin = int(texts["offset"]) + int(named["name"])
    return data[begin : data.index(0, begin)].decode()


def lay_out(data: bytes, sections: Records) -> tuple[bytearray, dict[int, int]]:
    """The sections that the code reads, one after the other, and their offsets by number."""
    texts = sections[struct.unpack_from("<H", data, 62)[0]]
    code, places = bytearray(), {}
    for number, each in enumerate(sections):
        flags = int(each["flags"])  # NumPy 1 does not combine its unsigned integers with Python's
        constant = not flags & WRITABLE or name_at(data, texts, each).startswith(CONSTANT_POINTERS)
        if each["kind"] == PROGRAM and flags & LOADED and constant:
            code += bytes(-len(code) % max(WORD, int(each["alignment"])))
            places[number] = len(code)
            code += read(data, each, np.dtype("u1")).tobytes()
    return code + bytes(-len(code) % WORD), places


def read_relocations(data: bytes, sections: Records, places: dict[int, int]) -> list[tuple[int, int, int, int]]:
    """The relocations of the sections that are loaded: offset in the image, kind, number of the symbol, addend."""
    return [
        (places[table["info"]] + int(each["place"]), int(each["kind"]), int(each["symbol"]), int(each["addend"]))
        for table in sections
        if table["kind"] == RELOCATIONS and table["info"] in places
        for each in read(data, table, RELOCATION)
    ]
