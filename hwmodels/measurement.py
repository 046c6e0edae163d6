"""How long something took on a device, and how that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np


@dataclass(frozen=True)
class MeasureProtocol:
    """How often and how long a model is run to time it.

    `processes` child processes are started one after the other; in each, every artifact is warmed up and then timed
    `runs` times, in turns with the others. More than `drift` relative change of the first artifact's median between
    the first and the last third of the runs makes the whole round be measured again, up to `retries` times.
    """

    runs: int = 30
    processes: int = 3
    warmup_s: float = 0.05
    time_limit_s: float = 60.0
    drift: float = 0.03
    retries: int = 2

    def __post_init__(self) -> None:
        for name, least in (("runs", 3), ("processes", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; at least {least} is needed")
        if self.time_limit_s <= 0:
            raise ValueError(f"time_limit_s is {self.time_limit_s}; it must be positive")


@dataclass(frozen=True)
class Measurement:
    """The times of one artifact's runs on a device, in seconds.

    `drifted` says that the reference's time moved more than the protocol allows in every try, so that the machine was
    not quiet: ratios within the measurement still hold better than the seconds do.
    """

    device: str
    run_s: tuple[float, ...]
    drifted: bool = False

    @property
    def latency_s(self) -> float:
        """The median run."""
        return float(np.median(self.run_s))

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % interval of the median, from order statistics (binomial, normal approximation; Conover 1999)."""
        return median_interval(self.run_s)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median of independent values; of fewer than six values their whole range."""
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        raise ValueError("the median of no values was asked for")
    half = 1.96 * sqrt(n) / 2
    low, high = int(np.floor(n / 2 - half)), int(np.ceil(n / 2 + half))
    return float(ordered[max(low, 0)]), float(ordered[min(high, n - 1)])
