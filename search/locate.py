"""Paths inside a specification: found when it is read, written so that a project can be moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import UserError
from .spec_defaults import Value


def located(values: Mapping[str, Value], bases: Sequence[Path], *, needed: bool = True) -> dict[str, Value]:
    """The values with every path that exists made absolute.

    Paths are: weights; the file of `file.py:factory` in model and data; DIR of `name:DIR?query` in data
    where it exists; a device that ends in .toml.

    Args:
        values: Flat keys.
        bases: Where a relative path is looked for, first come first served.
        needed: Whether the files are to be used; else a path that leads nowhere stays as it is.

    Raises:
        UserError: a file that is needed is in none of the bases.
    """

    def change(key: str, path: str, must_exist: bool) -> str:
        home = Path(os.path.expanduser(path))
        for base in bases:
            if (base / home).exists():
                return os.path.abspath(base / home)
        if must_exist and needed:
            places = " or ".join(str(base) for base in dict.fromkeys(bases))
            raise UserError(f"{key} names the file {path!r}, which is not in {places}")
        return path

    return {key: _changed(key, value, change) for key, value in values.items()}


def relative_to(values: Mapping[str, Value], folder: Path) -> dict[str, Value]:
    """The values with absolute paths written relative to the folder, but for those that share nothing with it."""
    here = os.path.abspath(folder)

    def change(key: str, path: str, must_exist: bool) -> str:
        if not os.path.isabs(path) or os.path.commonpath([here, path]) == os.path.sep:
            return path
        return os.path.relpath(path, here)

    return {key: _changed(key, value, change) for key, value in values.items()}


def _changed(key: str, value: Value, change: Callable[[str, str, bool], str]) -> Value:
    """Applies `change(key, path, must exist)` to the path inside a value, if there is one."""
    if key == "device":
        assert isinstance(value, tuple)
        return tuple(change(key, str(d), True) if str(d).endswith(".toml") else str(d) for d in value)
    if not isinstance(value, str) or not value:
        return value
    if key == "weights":
        return change(key, value, True)
    head, colon, tail = value.rpartition(":")
    if key in ("model", "data") and head.endswith(".py"):
        return change(key, head, True) + colon + tail
    body, mark, query = value.partition("?")
    head, colon, tail = body.partition(":")
    if key == "data" and tail:
        return head + colon + change(key, tail, False) + mark + query
    return value
