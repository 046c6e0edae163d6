"""The roofline: no operator is faster than its arithmetic or its traffic permits (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .device import Device
from .latency import Prediction
from .workload import Workload


@dataclass(frozen=True)
class Roofline:
    """`max(MACs / peak, bytes / bandwidth)` an operator, times `factor`, plus `launch_s` for each call.

    With the default factor it is a lower bound. A factor from a measured model of the same device makes it a guess;
    `error` is then the relative standard deviation to state with it.
    """

    device: Device
    factor: float = 1.0
    launch_s: float = 0.0
    error: float = 1.0

    @property
    def basis(self) -> str:
        """See `LatencyModel.basis`."""
        return "the roofline"

    def predict(self, workloads: Sequence[Workload]) -> Prediction:
        """See `LatencyModel.predict`."""
        sites: dict[str, float] = {}
        for work in workloads:
            sites[work.site] = sites.get(work.site, 0.0) + self.factor * max(self.bounds(work)) + self.launch_s
        total = sum(sites.values(), 0.0)
        return Prediction(total, self.error * total, sites)

    def bounds(self, work: Workload) -> tuple[float, float]:
        """Seconds that the arithmetic and the memory traffic take at their peaks."""
        return work.macs / self._rate(work.bits), work.moved_bytes / self.device.bytes_per_s

    def _rate(self, bits: int) -> float:
        """The best rate of kernels that hold operands of so many bits; of the widest where none do."""
        rates = self.device.macs_per_s
        return max((rate for width, rate in rates.items() if width >= bits), default=rates[max(rates)])
