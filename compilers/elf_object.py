"""Bytes as an object file of ELF, of 64 bits and little-endian: what an assembler's `.incbin` makes, in one write."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGN = 64
_HEADER, _SECTION, _SYMBOL = "<16sHHIQQQIHHHHHH", "<IIQQQQIIQQ", "<IBBHQQ"
# Of sections: kinds and flags; of symbols: a global object.
_PROGBITS, _SYMTAB, _STRTAB, _ALLOCATED = 1, 2, 3, 2
_GLOBAL_OBJECT = 0x11


def can_hold(header: bytes) -> bool:
    """Whether an object file that begins so is of the kind that is written here."""
    return header[:6] == b"\x7fELF\x02\x01" and len(header) >= struct.calcsize(_HEADER)


def write_object(path: Path, symbol: str, data: NDArray[Any], like: bytes) -> None:
    """Writes an object file whose read-only section is the data, under a global symbol.

    Args:
        path: The file.
        symbol: Its name for the linker.
        data: Contiguous.
        like: The first 64 bytes of another object file for the same processor, whose kind and flags it takes.

    Raises:
        ValueError: that other file is not of 64-bit little-endian ELF.
    """
    if not can_hold(like):
        raise ValueError("object files are written as 64-bit little-endian ELF only")
    identity, _, machine, version, *_, flags = struct.unpack(_HEADER, like[: struct.calcsize(_HEADER)])[:8]
    symbols = struct.pack(_SYMBOL, 0, 0, 0, 0, 0, 0)
    symbols += struct.pack(_SYMBOL, 1, _GLOBAL_OBJECT, 0, 1, 0, data.nbytes)
    names = b"\0" + symbol.encode() + b"\0"
    titles = [b"", b".rodata", b".symtab", b".strtab", b".shstrtab", b".note.GNU-stack"]
    title_table = b"\0".join(titles) + b"\0"
    starts = [title_table.index(b"\0" + title + b"\0") + 1 if title else 0 for title in titles]
    begin = _ALIGN
    padded = -data.nbytes % 8
    where = begin + data.nbytes + padded
    tables, sections = b"", [struct.pack(_SECTION, *[0] * 10)]
    sections.append(struct.pack(_SECTION, starts[1], _PROGBITS, _ALLOCATED, 0, begin, data.nbytes, 0, 0, _ALIGN, 0))
    for start, kind, table, link, info, align, entry in (
        # Of the symbols' section: its names are section 3, and symbol 1 is the first that is global.
        (starts[2], _SYMTAB, symbols, 3, 1, 8, struct.calcsize(_SYMBOL)),
        (starts[3], _STRTAB, names, 0, 0, 1, 0),
        (starts[4], _STRTAB, title_table, 0, 0, 1, 0),
        # Empty: the program's stack need not be executable.
        (starts[5], _PROGBITS, b"", 0, 0, 1, 0),
    ):
        sections.append(
            struct.pack(_SECTION, start, kind, 0, 0, where + len(tables), len(table), link, info, align, entry)
        )
        tables += table
    tables += b"\0" * (-(where + len(tables)) % 8)
    header = struct.pack(
        _HEADER, identity, 1, machine, version, 0, 0, where + len(tables), flags, struct.calcsize(_HEADER), 0, 0,
        struct.calcsize(_SECTION), len(sections), 4,
    )  # fmt: skip
    with path.open("wb") as file:
        file.write(header.ljust(begin, b"\0"))
        np.ascontiguousarray(data).tofile(file)
        file.write(b"\0" * padded + tables + b"".join(sections))
