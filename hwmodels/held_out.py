"""How wrong a latency model is on networks that it was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HeldOut:
    """The errors of predictions against measurements.

    Attributes:
        count: Of networks.
        within_10: Share whose prediction is within 10 % of the measurement; `within_5` likewise.
        median_error: The median of |predicted / measured - 1|.
        spearman: Rank correlation; `spearman_fast_third` that of the fastest third, where a search lives. NaN for fewer
            than three networks.
    """

    count: int
    within_10: float
    within_5: float
    median_error: float
    spearman: float
    spearman_fast_third: float


def held_out(predicted: Sequence[float], measured: Sequence[float]) -> HeldOut:
    """The errors of predicted seconds.

    Raises:
        ValueError: there is none, or not as many of both.
    """
    if not predicted or len(predicted) != len(measured):
        raise ValueError(
            f"{len(predicted)} predictions and {len(measured)} measurements were given; give as many of each"
        )
    found, truth = np.array(predicted), np.array(measured)
    errors = np.abs(found / truth - 1)
    fast = np.argsort(truth, kind="stable")[: -(-len(truth) // 3)]
    return HeldOut(
        count=len(truth),
        within_10=float(np.mean(errors <= 0.10)),
        within_5=float(np.mean(errors <= 0.05)),
        median_error=float(np.median(errors)),
        spearman=_spearman(found, truth),
        spearman_fast_third=_spearman(found[fast], truth[fast]),
    )


def _spearman(found: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr

    if len(truth) < 3:
        return float("nan")
    return float(spearmanr(found, truth)[0])
