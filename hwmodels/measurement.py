"""How long something took on a device, and how that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

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
        if not self.time_limit_s > 0:
            raise ValueError(f"time_limit_s is {self.time_limit_s}; it must be positive")
        for name in ("warmup_s", "drift"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True)
class Measurement:
    """The times of one artifact's runs on a device, in seconds.

    `drifted` says that the reference's time moved more than the protocol allows in every try, so that the machine was
    not quiet: ratios within the measurement still hold better than the seconds do. The runs are those of so many
    `processes`, one after the other, as many of each. `watts` are those of the processor's packages meanwhile, None
    where they cannot be read.
    """

    device: str
    run_s: tuple[float, ...]
    drifted: bool = False
    processes: int = 1
    watts: float | None = None

    def __post_init__(self) -> None:
        if self.processes < 1 or len(self.run_s) % self.processes:
            raise ValueError(f"{len(self.run_s)} runs are not as many of each of {self.processes} processes")

    @property
    def latency_s(self) -> float:
        """The median run."""
        return float(np.median(self.run_s))

    @property
    def energy_j(self) -> float | None:
        """What the packages use for one run, whatever else they do beside it; None where it cannot be read."""
        return None if self.watts is None else self.watts * self.latency_s

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % interval of the median (see `median_interval`), widened to the median of every process.

        How fast a model is differs from process to process, for as long as each lives: the runs of one are not
        independent, and how much they agree says little about the next one.
        """
        low, high = median_interval(self.run_s)
        medians = np.median(np.reshape(self.run_s, (self.processes, -1)), axis=1)
        return min(low, float(medians.min())), max(high, float(medians.max()))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median of independent values; of fewer than six values their whole range.

    From the k-th smallest to the k-th largest value, k the largest rank with 2 P(B < k) <= 5 %, where B, the number of
    values below the median, is binomial (n, 1/2) (Conover 1999).
    """
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        raise ValueError("the median of no values was asked for")
    rank, below = 0, 1  # below / 2**n is P(B <= rank)
    while 40 * below <= 2**n:
        rank += 1
        below += comb(n, rank)
    k = max(rank, 1)
    return float(ordered[k - 1]), float(ordered[n - k])
