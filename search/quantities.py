"""Metrics as people read them: per cent, milliseconds, kilobytes, and beside them the ratio to the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .json_text import mapping

_UNITS = {
    "s": (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)),
    "B": (("MB", 1e6), ("KB", 1e3), ("B", 1.0)),
    "J": (("J", 1.0), ("mJ", 1e-3), ("uJ", 1e-6)),
    "": (("G", 1e9), ("M", 1e6), ("K", 1e3), ("", 1.0)),
}
# Column, key in metrics, unit.
_COSTS = (
    ("size", "size_bytes", "B"),
    ("MACs", "macs", ""),
    ("memory", "peak_memory_bytes", "B"),
    ("energy (modelled)", "energy_j", "J"),
    ("energy", "energy_j", "J"),
)
# What only a whole page has room for.
_MORE_COSTS = (("size, entropy-coded", "entropy_coded_bytes", "B"),)


def quantity(value: object, unit: str) -> str:
    """A number of base units with the prefix that suits it: `1.23 ms`, `45.6 KB`; a dash where there is none.

    Args:
        unit: `s`, `B`, `J`, or nothing for counts.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-"
    name, scale = next(((n, s) for n, s in _UNITS[unit] if abs(value) >= s), _UNITS[unit][-1])
    return f"{value / scale:.3g} {name}".rstrip()


def metric_names(metrics: Sequence[Mapping[str, object]], *, every: bool = False) -> list[str]:
    """The columns that at least one of the metrics fills; `every`: those for a page, too."""
    devices = list(dict.fromkeys(name for entry in metrics for name in mapping(entry.get("latency_s"))))
    columns = (*_COSTS, *_MORE_COSTS) if every else _COSTS
    costs = [name for name, key, _ in columns if any(_fills(entry, name, key) for entry in metrics)]
    tested = ["test accuracy"] if any(entry.get("test_accuracy") is not None for entry in metrics) else []
    return ["accuracy", *tested, *(f"latency {device}" for device in devices), *costs]


def _fills(metrics: Mapping[str, object], name: str, key: str) -> bool:
    """Whether a column is that of the metric: joules that were measured have another one than those of a model."""
    if key == "energy_j" and (metrics.get("energy_measured") is True) != (name == "energy"):
        return False
    return metrics.get(key) is not None


def metric_cells(metrics: Mapping[str, object], original: Mapping[str, object], names: Sequence[str]) -> list[str]:
    """One text per name: `91.20 % (-0.31)` in points against the original, `1.23 ms (0.41x)`.

    Where the change has an interval, it follows: `91.20 % (-0.31 [-0.52, -0.09])`.
    """
    keys = {name: (key, unit) for name, key, unit in (*_COSTS, *_MORE_COSTS)}
    cells = []
    for name in names:
        if name.endswith("accuracy"):
            key = name.replace(" ", "_")
            cells.append(_accuracy(metrics.get(key), original.get(key), metrics.get(f"{key}_change_ci95")))
        elif name in keys:
            key, unit = keys[name]
            cells.append(quantity(metrics.get(key), unit) + _ratio(metrics.get(key), original.get(key)))
        else:
            device = name.removeprefix("latency ")
            value, base = _latency(metrics, device), _latency(original, device)
            ratio = mapping(metrics.get("latency_ratio")).get(device)
            # Measured in turns with the original, the ratio is more exact than the quotient of two medians.
            cells.append(quantity(value, "s") + (_ratio(value, base) if ratio is None else _ratio(ratio, 1.0)))
    return cells


def _accuracy(value: object, base: object, interval: object) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    if not isinstance(base, (int, float)):
        return f"{100 * value:.2f} %"
    ends = list(interval) if isinstance(interval, (list, tuple)) else []
    known = len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
    within = f" [{', '.join(f'{100 * end:+.2f}' for end in ends)}]" if known else ""
    return f"{100 * value:.2f} % ({100 * (value - base):+.2f}{within})"


def _ratio(value: object, base: object) -> str:
    if not isinstance(value, (int, float)) or not isinstance(base, (int, float)) or not base:
        return ""
    return f" ({value / base:.3g}x)"


def _latency(metrics: Mapping[str, object], device: str) -> object:
    return mapping(mapping(metrics.get("latency_s")).get(device)).get("value")
