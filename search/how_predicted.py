"""How far predicted latencies of a run may be off, for whoever reads them."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, nan

from .json_text import mapping
from .objective import number


def how_predicted(front: Mapping[str, object]) -> str:
    """That latency is predicted, and how far the original's may be off on each device.

    Args:
        front: front.json; may be empty.
    """
    latencies = mapping(mapping(mapping(front.get("original")).get("metrics")).get("latency_s"))
    spans = []
    for label, entry in latencies.items():
        value, interval = number(mapping(entry).get("value")), mapping(entry).get("ci95")
        high = number(interval[1]) if isinstance(interval, list) and len(interval) == 2 else nan
        if value and isfinite(high / value):
            spans.append(f"{label} within {high / value - 1:.0%}")
    text = f" ({', '.join(spans)}, with 95 % confidence)" if spans else ""
    return f"predicted by the device's latency model, not measured{text}"
