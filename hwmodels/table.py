"""Latency from a table of measured kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .corrector import Corrector
from .device import Device
from .kernel_database import KernelTime
from .latency import Prediction
from .regression import KernelRegression
from .workload import Workload

# The standard deviation of a time, from half the width of its 95 % interval.
_HALF_WIDTHS = 1.96
# The same, relatively, of what met no quiet machine beside its interval: see `quiet.settled`.
DISTURBED = 0.1


class UnknownKernel(ValueError):
    """A kernel that the table does not hold, and nothing that could predict it."""


@dataclass(frozen=True)
class TableModel:
    """Sums the times of a network's kernels: from the table, or else predicted from those that are in it.

    `times` is by the workload's key. Predictions state their own error: the table's intervals, how uncertain the
    regression is of every kernel that was not measured, and the corrector's error of whole networks.
    """

    device: Device
    times: Mapping[str, KernelTime]
    regression: KernelRegression | None = None
    corrector: Corrector = field(default_factory=Corrector)

    @property
    def basis(self) -> str:
        """See `LatencyModel.basis`."""
        return "measured kernels"

    def predict(self, workloads: Sequence[Workload]) -> Prediction:
        """See `LatencyModel.predict`.

        Raises:
            UnknownKernel: a kernel is not in the table and there is no regression.
        """
        if not workloads:
            return Prediction(0.0, 0.0, {})
        seconds, variances = self.kernels(workloads)
        called = self.corrector.calls_s(seconds, workloads)
        whole = float(called.sum())
        sites: dict[str, float] = {}
        # A kernel that is called often is wrong by the same every time: its errors add up before they are squared.
        deviations: dict[str, float] = {}
        for work, own, variance in zip(workloads, called, variances, strict=True):
            sites[work.site] = sites.get(work.site, 0.0) + float(own)
            key = work.key()
            deviations[key] = deviations.get(key, 0.0) + self.corrector.factor * float(np.sqrt(variance))
        spread = sum(deviation**2 for deviation in deviations.values())
        return Prediction(whole, float(np.sqrt(spread + (self.corrector.error * whole) ** 2)), sites)

    def kernels(self, workloads: Sequence[Workload]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds of every kernel alone, and the variances of those figures, each of shape (n,)."""
        seconds, variances = np.empty(len(workloads)), np.empty(len(workloads))
        unknown = []
        for place, work in enumerate(workloads):
            known = self.times.get(work.key())
            if known is None:
                unknown.append(place)
                continue
            seconds[place] = known.time.median_s
            variances[place] = ((known.time.high_s - known.time.low_s) / 2 / _HALF_WIDTHS) ** 2
            if not known.time.quiet:
                variances[place] += (DISTURBED * known.time.median_s) ** 2
        if unknown:
            if self.regression is None:
                first = workloads[unknown[0]]
                raise UnknownKernel(
                    f"{len(unknown)} kernels are not in the table of {self.device.name}, the first of them {first.op} "
                    f"{dict(first.shapes)}; measure them with `planish profile`"
                )
            missing = [workloads[place] for place in unknown]
            seconds[unknown] = self.regression.predict(missing)
            variances[unknown] = (self.regression.spread(missing) * seconds[unknown]) ** 2
        return seconds, variances

    def unmeasured(self, workloads: Sequence[Workload]) -> list[Workload]:
        """The kernels that are not in the table, each once."""
        found: dict[str, Workload] = {}
        for work in workloads:
            if work.key() not in self.times:
                found.setdefault(work.key(), work)
        return list(found.values())
