"""One fused operator at fixed shapes: what it multiplies and what it moves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """An operator of a model, for latency models.

    Attributes:
        site: The layer of the model that it belongs to; "" where it serves none, such as a change of layout.
        op: What it computes, such as `conv2d`.
        shapes: Its sizes by name (channels, rows, kernel, stride, ...).
        macs: Multiply-accumulates of the operator itself, without padding.
        moved_bytes: All that it reads and writes once, weights included.
        bits: Width of the operands of its multiplications.
        weight_bytes: What it reads that is constant.
        threads: It is spread over.
        form: Whatever else decides how long it takes: epilogue, layout, tile.
        cycles: The compiler's own estimate by counting instructions and cache lines; 0 where it has none.
    """

    site: str
    op: str
    shapes: Mapping[str, int]
    macs: int
    moved_bytes: int
    bits: int = 32
    weight_bytes: int = 0
    threads: int = 1
    form: str = ""
    cycles: float = 0.0

    def key(self) -> str:
        """Equal for equal work, whatever the site (16 hexadecimal digits)."""
        parts = [self.op, dict(sorted(self.shapes.items())), self.bits, self.threads, self.form]
        text = json.dumps(parts, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
