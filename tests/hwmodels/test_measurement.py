"""Medians with their intervals against the binomial definition, and protocols that cannot be followed."""

from __future__ import annotations

from math import comb, inf, nan
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.hwmodels.measurement import Measurement, MeasureProtocol, median_interval

TIMES = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40)


def coverage(n: int, k: int) -> float:
    """How likely the median lies between the k-th smallest and the k-th largest of n independent values."""
    # It does not where fewer than k of them are below it, or fewer than k above.
    return 1 - 2 * sum(comb(n, j) for j in range(k)) / float(2**n)


@given(TIMES)
def test_latency_is_the_median_run(times: list[float]) -> None:
    assert Measurement("cpu", tuple(times)).latency_s == pytest.approx(median(times))


@pytest.mark.parametrize("n", [*range(6, 120), 300, 1000, 1001])
def test_the_interval_is_the_narrowest_of_ranks_that_covers_95_percent(n: int) -> None:
    low, high = median_interval(list(range(1, n + 1)))
    k = int(low)
    assert high == n + 1 - k
    assert coverage(n, k) >= 0.95
    assert coverage(n, k + 1) < 0.95


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_of_fewer_than_six_values_the_interval_is_their_whole_range(n: int) -> None:
    assert median_interval(list(range(n))) == (0, n - 1)


@given(TIMES)
def test_the_interval_holds_the_median_and_does_not_care_for_order(times: list[float]) -> None:
    low, high = Measurement("cpu", tuple(times)).ci95
    assert low <= median(times) <= high
    assert median_interval(times[::-1]) == (low, high)
    assert median_interval([-t for t in times]) == (-high, -low)


def test_the_interval_covers_the_true_median_in_95_percent_of_samples() -> None:
    rng = np.random.default_rng(0)
    for n in (8, 30, 90):
        # Times are skewed: most runs are near the fastest, a few take much longer. The median is exp(0).
        samples = rng.lognormal(0.0, 1.0, (4000, n))
        inside = [low <= 1.0 <= high for low, high in map(median_interval, samples.tolist())]
        # Four standard deviations of a share of 4000 below 95 %; the exact coverage may be up to 99.3 % (n = 8).
        assert np.mean(inside) > 0.95 - 4 * (0.95 * 0.05 / 4000) ** 0.5


def test_the_interval_reaches_to_the_median_of_every_process() -> None:
    # Two processes in which a model is as fast as can be, and one in which it is slower throughout.
    runs = (*[1.0, 1.01] * 5, *[1.2, 1.22] * 5, *[1.0, 1.02] * 5)
    whole = Measurement("cpu", runs, processes=3)
    assert whole.latency_s == median(runs) == pytest.approx(1.015)
    assert whole.ci95 == pytest.approx((1.0, 1.21))
    assert median_interval(runs) == (1.0, 1.2)
    assert Measurement("cpu", runs).ci95 == median_interval(runs)
    with pytest.raises(ValueError, match="30 runs are not as many of each of 4 processes"):
        Measurement("cpu", runs, processes=4)


def test_the_median_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_the_default_protocol_runs_at_least_30_times_in_3_processes() -> None:
    protocol = MeasureProtocol()
    assert protocol.runs >= 30
    assert protocol.processes >= 3
    assert protocol.drift <= 0.03
    assert protocol.warmup_s > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("runs", 2), ("runs", 0), ("processes", 0), ("retries", -1), ("time_limit_s", 0), ("time_limit_s", nan)),
        *(("warmup_s", -0.1), ("warmup_s", nan), ("drift", -1), ("drift", nan)),
    ],
)
def test_a_protocol_that_cannot_be_followed_names_the_key_and_the_value(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        MeasureProtocol(**{name: value})  # type: ignore[arg-type]


def test_the_least_protocol_is_allowed() -> None:
    MeasureProtocol(runs=3, processes=1, warmup_s=0, time_limit_s=1e-3, drift=inf, retries=0)
