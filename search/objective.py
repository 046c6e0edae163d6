"""What a search makes better (objectives) and what a result must keep (budgets)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from .errors import UserError, nearest

Goal = Literal["minimize", "maximize"]

# The key of every metric in a trial's metrics; latency is held by device.
METRIC_KEYS = {
    "accuracy": "accuracy",
    "latency": "latency_s",
    "size": "size_bytes",
    "memory": "peak_memory_bytes",
    "energy": "energy_j",
    "macs": "macs",
}

_BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_UNITS: dict[str, dict[str, float]] = {
    "accuracy": {"": 1.0},
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "size": _BYTES,
    "memory": _BYTES,
    "energy": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "nJ": 1e-9},
    "macs": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
}
_FORMS = {
    "accuracy": "accuracy>=0.91 or accuracy>=-0.5pp",
    "latency": "latency<=2ms, latency<=0.5x or latency[DEVICE]<=2ms",
    "size": "size<=300KB or size<=0.5x",
    "memory": "memory<=1MB or memory<=0.5x",
    "energy": "energy<=3mJ or energy<=0.5x",
    "macs": "macs<=20M or macs<=0.5x",
}
_RELATIVE = {"x", "pp"}
_GRAMMAR = re.compile(
    r"\s*(?P<metric>[A-Za-z_]+)\s*(?:\[(?P<device>[^\]]*)\])?\s*(?P<operator>[<>=!~]+)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-zµμ%]*)\s*"
)


@dataclass(frozen=True)
class Objective:
    """A metric, whether it is to fall or to rise, and the bound a result must keep (None: no bound).

    `metric` is a name of `METRIC_KEYS`; latency names its device: `latency[cpu]`.
    """

    metric: str
    goal: Goal
    bound: float | None = None

    def loss(self, value: float) -> float:
        """The value as something to make small; NaN stays NaN."""
        return value if self.goal == "minimize" else -value

    def allows(self, value: float) -> bool:
        """Whether the value keeps the bound; a NaN keeps none."""
        if math.isnan(value):
            return False
        return self.bound is None or self.loss(value) <= self.loss(self.bound)

    def value(self, metrics: Mapping[str, object]) -> float:
        """The metric in a trial's metrics as fraction, seconds, bytes, joules or MACs; NaN where it is absent."""
        name, device = split_metric(self.metric)
        entry = metrics.get(METRIC_KEYS[name])
        if device is not None:
            by_device = entry if isinstance(entry, Mapping) else {}
            latency = by_device.get(device)
            entry = latency.get("value") if isinstance(latency, Mapping) else None
        return number(entry)

    def ratio(self, metrics: Mapping[str, object], original: Mapping[str, object]) -> float:
        """The metric relative to the original's; NaN where either is absent or the original's is 0.

        A latency that was measured in turns with the original carries its ratio, which drift of the machine between
        two measurements does not touch.
        """
        name, device = split_metric(self.metric)
        measured = metrics.get("latency_ratio") if name == "latency" else None
        ratio = measured.get(device) if isinstance(measured, Mapping) else None
        if not math.isnan(number(ratio)):
            return number(ratio)
        base = self.value(original)
        return self.value(metrics) / base if base else math.nan


def number(value: object) -> float:
    """The value as a float; NaN where it is none, or larger than any."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


@dataclass(frozen=True)
class Budget:
    """A bound as the user wrote it: absolute in base units, or relative to the original (`x` factor, `pp` points)."""

    text: str
    metric: str
    number: float
    unit: Literal["", "x", "pp"]

    @property
    def goal(self) -> Goal:
        """Which way the metric is better."""
        return goal_of(self.metric)

    def resolve(self, original_metrics: Mapping[str, object]) -> Objective:
        """The objective with its bound in base units.

        Raises:
            UserError: the bound is relative and the original has no such metric.
        """
        if not self.unit:
            return Objective(self.metric, self.goal, self.number)
        original = Objective(self.metric, self.goal).value(original_metrics)
        if math.isnan(original):
            raise UserError(
                f"budget {self.text!r} is relative to the original model, whose {self.metric} this run does not know; "
                "give an absolute bound or add the metric to objectives"
            )
        bound = original * self.number if self.unit == "x" else original + self.number / 100
        return Objective(self.metric, self.goal, bound)


def parse_budget(text: str, devices: Sequence[str]) -> tuple[Budget, ...]:
    """Reads `latency<=0.5x`; a latency without a device stands for every device of the search.

    Args:
        devices: Labels (`device_label`) of the search's devices.

    Raises:
        UserError: the form, metric, operator, unit or device is unknown, or the number makes no sense.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise UserError(f"budget {text!r} is not METRIC<=NUMBER UNIT; allowed are {'; '.join(_FORMS.values())}")
    metric, device, unit = match["metric"], match["device"], match["unit"].replace("µ", "u").replace("μ", "u")
    if metric not in METRIC_KEYS:
        raise UserError(f"budget {text!r} names the unknown metric {metric!r}; {nearest(metric, METRIC_KEYS)}")
    operator = "<=" if goal_of(metric) == "minimize" else ">="
    if match["operator"] != operator:
        raise UserError(f"budget {text!r} has the operator {match['operator']!r}; allowed: {_FORMS[metric]}")
    number, relative = _number(text, metric, float(match["number"]), unit)
    names = [f"latency[{name}]" for name in _devices(text, device, devices)] if metric == "latency" else [metric]
    if metric != "latency" and device is not None:
        raise UserError(f"budget {text!r} names a device, which only latency takes; allowed: {_FORMS[metric]}")
    return tuple(Budget(text.strip(), name, number, relative) for name in names)


def objectives_of(metrics: Sequence[str], devices: Sequence[str]) -> tuple[Objective, ...]:
    """The objectives of a search, one per device for `latency`.

    Raises:
        UserError: a metric is unknown or named twice.
    """
    for metric in metrics:
        if metric not in METRIC_KEYS:
            raise UserError(f"objectives names the unknown metric {metric!r}; {nearest(metric, METRIC_KEYS)}")
    if len(set(metrics)) != len(metrics):
        raise UserError(f"objectives = {list(metrics)} names a metric twice")
    names = [n for m in metrics for n in ([f"latency[{d}]" for d in devices] if m == "latency" else [m])]
    return tuple(Objective(name, goal_of(name)) for name in names)


def device_label(device: str) -> str:
    """How a device is named in metrics: a TOML file by its stem, any other device as it is written."""
    return PurePath(device).stem if device.endswith(".toml") else device


def goal_of(metric: str) -> Goal:
    """Which way a metric is better."""
    return "maximize" if metric == "accuracy" else "minimize"


def split_metric(metric: str) -> tuple[str, str | None]:
    """`latency[cpu]` as (`latency`, `cpu`), any other metric as (metric, None)."""
    name, bracket, device = metric.partition("[")
    return name, device.removesuffix("]") if bracket else None


def _number(text: str, metric: str, number: float, unit: str) -> tuple[float, Literal["", "x", "pp"]]:
    units = _UNITS[metric]
    relative: Literal["x", "pp"] = "pp" if metric == "accuracy" else "x"
    if unit not in units and unit != relative:
        named = repr(unit) if unit else "no unit"
        raise UserError(f"budget {text!r} has {named}; allowed: {_FORMS[metric]}")
    if metric == "accuracy":
        if unit == "" and not 0 <= number <= 1:
            raise UserError(f"budget {text!r}: accuracy is a fraction from 0 to 1; allowed: {_FORMS[metric]}")
    elif not 0 < number < math.inf:
        raise UserError(f"budget {text!r}: the bound must be above 0 and finite; allowed: {_FORMS[metric]}")
    return (number, relative) if unit in _RELATIVE else (number * units[unit], "")


def _devices(text: str, device: str | None, devices: Sequence[str]) -> Sequence[str]:
    if device is None:
        return devices
    if device_label(device) not in devices:
        raise UserError(
            f"budget {text!r} names the device {device!r}, not one of the search; {nearest(device, devices)}"
        )
    return [device_label(device)]
