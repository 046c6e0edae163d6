"""Python numbers from TVM's attributes."""

from __future__ import annotations

from typing import Any


def pair(values: Any) -> tuple[int, int]:
    """Height and width of a stride, a dilation or a window."""
    first, second = (int(v) for v in values)
    return first, second


def frame(values: Any) -> tuple[int, int, int, int]:
    """Padding at the top, left, bottom and right."""
    top, left, bottom, right = (int(v) for v in values)
    return top, left, bottom, right
