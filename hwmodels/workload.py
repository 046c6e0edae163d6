"""One fused operator at fixed shapes: what it multiplies and what it moves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """An operator of a model, for latency models.

    `shapes` names its sizes (channels, rows, kernel, stride, ...); `bits` is the width of the operands of its
    multiplications.
    """

    site: str
    op: str
    shapes: Mapping[str, int]
    macs: int
    moved_bytes: int
    bits: int = 32

    def key(self) -> str:
        """Equal for equal work, whatever the site (16 hexadecimal digits)."""
        text = json.dumps([self.op, dict(sorted(self.shapes.items())), self.bits], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
