"""Latency from the compiler's own count of cycles, for a device of which nothing was measured yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .device import Device
from .latency import Prediction
from .roofline import Roofline
from .workload import Workload


@dataclass(frozen=True)
class CountedCycles:
    """`cycles / clock` an operator, the roofline where none were counted, plus `launch_s` for each call.

    The clock is a guess, so that ratios between models mean more than seconds; `error` is the relative standard
    deviation to state with them.
    """

    device: Device
    clock_hz: float = 3e9
    launch_s: float = 0.3e-6
    error: float = 0.3

    def predict(self, workloads: Sequence[Workload]) -> Prediction:
        """See `LatencyModel.predict`."""
        roofline = Roofline(self.device)
        sites: dict[str, float] = {}
        for work in workloads:
            own = work.cycles / self.clock_hz if work.cycles else max(roofline.bounds(work))
            sites[work.site] = sites.get(work.site, 0.0) + own + self.launch_s
        total = sum(sites.values(), 0.0)
        return Prediction(total, self.error * total, sites)
