"""`manifest.json`: what is written is read, and nothing in a folder can do worse than a ManifestError."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.compilers.manifest import FORMAT, NAME, Manifest, ManifestError, Port, digest, read

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes


def manifest(**changes: Any) -> Manifest:
    plain = Manifest(
        compiler="tvm",
        library="model.so",
        device="cpu?threads=2",
        target={"kind": "llvm", "mcpu": "host"},
        threads=2,
        inputs=(Port("input", (1, 3, 8, 8), "float32"),),
        outputs=(Port("output", (1, 10), "float32"),),
        tolerance=1e-3,
        files={"model.so": EMPTY},
        working_bytes=4096,
        kernels=(("conv3x3", "layer1.conv"), ("dense", "")),
        versions={"torch": "2.13.0"},
        model={"classes": ["Katze", "Hündin"], "mean": [0.5]},
    )
    return replace(plain, **changes)


def written(folder: Path, **changes: Any) -> Manifest:
    result = manifest(**changes)
    (folder / "model.so").touch()
    result.write(folder)
    return result


def test_what_is_written_is_read(tmp_path: Path) -> None:
    original = written(tmp_path)
    assert read(tmp_path) == original


def test_the_checksum_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert digest(tmp_path / "a") == EMPTY
    (tmp_path / "b").write_bytes(b"abc")
    assert digest(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180


def test_two_manifests_of_the_same_model_are_the_same_bytes(tmp_path: Path) -> None:
    written(tmp_path)
    first = (tmp_path / NAME).read_bytes()
    written(tmp_path, target={"mcpu": "host", "kind": "llvm"})
    assert (tmp_path / NAME).read_bytes() == first


def test_a_folder_without_a_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no compiled model.*planish export"):
        read(tmp_path)


def test_a_missing_file_and_a_changed_one_are_named(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "model.so").write_bytes(b"other")
    with pytest.raises(ManifestError, match=r"model\.so is not the file that was exported"):
        read(tmp_path)
    (tmp_path / "model.so").unlink()
    with pytest.raises(ManifestError, match=r"model\.so is missing"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", ".."])
def test_a_file_outside_the_folder_is_refused_unread(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "secret").touch()
    written(folder, files={"model.so": EMPTY, name: EMPTY})
    with pytest.raises(ManifestError, match="not inside the folder"):
        read(folder)


def test_a_library_without_a_checksum_is_refused(tmp_path: Path) -> None:
    written(tmp_path, library="other.so")
    with pytest.raises(ManifestError, match=r"no checksum for its library 'other\.so'"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "x" * 5000, "a\0b", "model.so/x", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path, files={"model.so": EMPTY, name: EMPTY})
    with pytest.raises(ManifestError):
        read(tmp_path)


def test_another_format_is_refused_with_the_one_that_is_read(tmp_path: Path) -> None:
    written(tmp_path, format=FORMAT + 1)
    with pytest.raises(ManifestError, match=f"format {FORMAT + 1}; this version reads {FORMAT}"):
        read(tmp_path)


GOOD = json.loads(json.dumps(manifest().__dict__, default=lambda port: port.__dict__))
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), _VALUES, max_size=3), st.sets(st.sampled_from(sorted(GOOD))))
def test_a_manifest_with_any_values_is_read_or_refused(changes: dict[str, Any], dropped: set[str]) -> None:
    data = {key: value for key, value in {**GOOD, **changes}.items() if key not in dropped}
    check(json.dumps(data).encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(content: bytes) -> None:
    check(content)


@given(st.data())
def test_a_manifest_with_a_few_damaged_bytes_is_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(content))


@pytest.mark.parametrize("value", [math.inf, math.nan, 10**400, -1.5, [], None, {}, "x"])
@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_value_out_of_range_is_read_or_refused(key: str, value: object) -> None:
    check(json.dumps({**GOOD, key: value}).encode())


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}", b"null", b"1", b'"x"'])
def test_absurd_json_is_refused(content: bytes) -> None:
    check(content)


def check(content: bytes) -> None:
    """Reads a folder whose manifest is these bytes: nothing but ManifestError may come of it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.so").touch()
        Path(folder, NAME).write_bytes(content)
        with suppress(ManifestError):
            assert isinstance(read(Path(folder)), Manifest)
