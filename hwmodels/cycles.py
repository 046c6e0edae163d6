"""Latency from the compiler's own count of cycles, for a device of which nothing was measured yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .device import Device
from .latency import Prediction
from .roofline import Roofline
from .workload import Workload

# What a description leaves open: how far below its peak the device's memory, caches and other units keep it.
DESCRIBED_ERROR = 0.5


@dataclass(frozen=True)
class CountedCycles:
    """`cycles / clock` an operator, the roofline where none were counted, plus `launch_s` for each call.

    The clock is a guess, so that ratios between models mean more than seconds; `error` is the relative standard
    deviation to state with them. Threads are taken to share an operator's work evenly.
    """

    device: Device
    clock_hz: float = 3e9
    launch_s: float = 0.3e-6
    error: float = 0.3

    @staticmethod
    def described(device: Device, macs_per_cycle: float) -> CountedCycles:
        """Of a device of which nothing is known but its description.

        Args:
            device: Its float32 peak is what the counted cycles are scaled by.
            macs_per_cycle: Of float32 that the count of cycles takes one thread to start at most.
        """
        widest = device.macs_per_s[max(device.macs_per_s)]
        return CountedCycles(device, widest / device.threads / macs_per_cycle, error=DESCRIBED_ERROR)

    @property
    def basis(self) -> str:
        """See `LatencyModel.basis`."""
        return "the compiler's count of cycles"

    def predict(self, workloads: Sequence[Workload]) -> Prediction:
        """See `LatencyModel.predict`."""
        roofline = Roofline(self.device)
        sites: dict[str, float] = {}
        for work in workloads:
            own = work.cycles / work.threads / self.clock_hz if work.cycles else max(roofline.bounds(work))
            sites[work.site] = sites.get(work.site, 0.0) + own + self.launch_s
        total = sum(sites.values(), 0.0)
        return Prediction(total, self.error * total, sites)
