"""The latency model of a device's measured kernels and networks."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from ..hwmodels.corrector import LEAST, Corrector
from ..hwmodels.device import Device
from ..hwmodels.kernel_database import KernelTime, NetworkTime
from ..hwmodels.regression import LEAST as LEAST_KERNELS
from ..hwmodels.regression import KernelRegression
from ..hwmodels.table import TableModel

_REMEMBERED = 4
_REGRESSIONS: dict[object, KernelRegression] = {}


def fitted(
    device: Device,
    times: Mapping[str, KernelTime],
    networks: Sequence[NetworkTime],
    seed: int = 0,
    own: Container[str] | None = None,
) -> TableModel:
    """Fits a regression where the kernels are enough for one, and a corrector where the networks are.

    Args:
        device: Whose times these are.
        times: Of kernels, by key.
        networks: Of any model.
        seed: Of which kernels a regression is fitted to, where they are very many.
        own: The keys of the networks whose error is stated; None: of all.
    """
    regression = regression_of(times, seed) if len(times) >= LEAST_KERNELS else None
    model = TableModel(device, times, regression)
    chosen = _usable(model, networks)
    if len(chosen) < LEAST:
        return model
    calls = [network.workloads for network in chosen]
    sums = [float(model.kernels(network)[0].sum()) for network in calls]
    judged = None if own is None else [network.key() in own for network in chosen]
    seconds = [network.time.median_s for network in chosen]
    return replace(model, corrector=Corrector.fit(sums, calls, seconds, judged))


def regression_of(times: Mapping[str, KernelTime], seed: int = 0) -> KernelRegression:
    """The regression of kernel times by key; those last fitted are remembered, because a fit takes a second.

    Raises:
        ValueError: they are too few.
    """
    known = (seed, tuple((key, time.time) for key, time in times.items()))
    if known not in _REGRESSIONS:
        while len(_REGRESSIONS) >= _REMEMBERED:
            del _REGRESSIONS[next(iter(_REGRESSIONS))]
        _REGRESSIONS[known] = KernelRegression.fit(list(times.values()), seed)
    return _REGRESSIONS[known]


def _usable(model: TableModel, networks: Sequence[NetworkTime]) -> list[NetworkTime]:
    """The networks whose kernels have times; those that were timed on a quiet machine, where they are enough."""
    known = [n for n in networks if model.regression is not None or not model.unmeasured(n.workloads)]
    quiet = [network for network in known if network.time.quiet]
    return quiet if len(quiet) > LEAST else known
