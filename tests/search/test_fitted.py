"""The regression of a device's kernels is fitted once for the same times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planish.hwmodels.kernel_database import KernelTime
from planish.hwmodels.quiet import Settled
from planish.hwmodels.regression import LEAST
from planish.hwmodels.workload import Workload
from planish.search import fitted


def time_of(size: int) -> KernelTime:
    work = Workload("", "conv2d", {"o": size}, 1000 * size, 100, 32, 10, 1, str(size), 1000.0 * size)
    return KernelTime(work, Settled(1e-6 * size, 1e-6 * size, 1e-6 * size, 12, True))


def test_a_regression_is_fitted_anew_where_a_time_or_the_seed_is_another() -> None:
    times = {time.workload.key(): time for time in map(time_of, range(1, LEAST + 1))}
    first = fitted.regression_of(times)
    assert fitted.regression_of(dict(times)) is first
    assert fitted.regression_of(times, seed=1) is not first
    key = next(iter(times))
    slower = times | {key: replace(times[key], time=replace(times[key].time, median_s=1e-3))}
    other = fitted.regression_of(slower)
    assert other is not first
    works = [time.workload for time in times.values()]
    assert not np.allclose(other.predict(works), first.predict(works))


def test_few_regressions_are_remembered() -> None:
    times = {time.workload.key(): time for time in map(time_of, range(1, LEAST + 1))}
    for seed in range(10):
        fitted.regression_of(times, seed)
    assert len(fitted._REGRESSIONS) <= fitted._REMEMBERED
