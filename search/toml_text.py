"""Reading and writing the small part of TOML that specifications need: scalars, lists and one level of tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def read_toml(text: str) -> dict[str, Any]:
    """Reads a TOML document.

    Raises:
        ValueError: it is not TOML; the message names line and column.
    """
    import tomllib

    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def write_toml(values: Mapping[str, object]) -> str:
    """Writes flat keys, `key` or `table.key`, as a TOML document; keys without a table come first.

    Raises:
        TypeError: a value is not a text, number, truth value or a list of them.
    """
    lines = [f"{key} = {_value(value)}" for key, value in values.items() if "." not in key]
    tables: dict[str, list[str]] = {}
    for key, value in values.items():
        table, dot, name = key.partition(".")
        if dot:
            tables.setdefault(table, []).append(f"{name} = {_value(value)}")
    for table, entries in tables.items():
        lines += ["", f"[{table}]", *entries]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but TOML also wants the delete character escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"{value!r} has the type {type(value).__name__}; TOML is written of texts, numbers and lists")
