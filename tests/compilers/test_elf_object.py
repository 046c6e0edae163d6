"""Object files of bytes: what a linker and a program find in them."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from planish.compilers.elf_object import can_hold, write_object


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The beginning of an object file that this machine's compiler writes."""
    file = tmp_path_factory.mktemp("like") / "like.o"
    subprocess.run(["c++", "-x", "c", "-c", "-", "-o", str(file)], input=b"int f(void) { return 3; }", check=True)
    return file.read_bytes()[:64]


@pytest.mark.parametrize("size", [1, 7, 8, 64, 65, 100_003])
def test_a_program_finds_the_bytes_under_their_symbol(like: bytes, tmp_path: Path, size: int) -> None:
    assert can_hold(like)
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    write_object(tmp_path / "data.o", "the_data", data, like)
    linked = subprocess.run(
        ["c++", "-shared", "-Wl,--fatal-warnings", str(tmp_path / "data.o"), "-o", str(tmp_path / "data.so")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert linked.returncode == 0, linked.stderr
    found = (ctypes.c_uint8 * size).in_dll(ctypes.CDLL(str(tmp_path / "data.so")), "the_data")
    assert bytes(found) == data.tobytes()
    assert ctypes.addressof(found) % 64 == 0


def test_other_kinds_of_object_files_are_refused(tmp_path: Path) -> None:
    for header in (b"", b"\x7fELF\x01\x01" + b"\0" * 58, b"\xcf\xfa\xed\xfe" + b"\0" * 60):
        assert not can_hold(header)
        with pytest.raises(ValueError, match="64-bit little-endian"):
            write_object(tmp_path / "data.o", "the_data", np.zeros(1, np.uint8), header)
    assert not (tmp_path / "data.o").exists()
