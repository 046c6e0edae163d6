"""JSON from files that a disk or a hand may have changed: whatever parses is safe to compute with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# The largest float has 309 digits.
_DIGITS = 300


def parsed(text: str | bytes) -> Any:
    """What `json.loads` gives, but that a whole number beyond every float is infinite.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def mapping(value: object) -> Mapping[str, object]:
    """A value of a document where it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}
