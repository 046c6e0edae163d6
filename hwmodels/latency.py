"""The LatencyModel role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .device import Device
from .workload import Workload


@dataclass(frozen=True)
class Prediction:
    """Seconds that a model takes, with the standard deviation of that figure and the share of each site."""

    latency_s: float
    std_s: float
    site_s: Mapping[str, float]


class LatencyModel(Protocol):
    """Predicts how long a model's operators take on one device.

    An empty model takes no time; more of the same work never takes less.
    """

    @property
    def device(self) -> Device:
        """What the predictions are about."""
        ...

    @property
    def basis(self) -> str:
        """What the predictions come from, in a few words."""
        ...

    def predict(self, workloads: Sequence[Workload]) -> Prediction:
        """The latency of the operators run one after the other."""
        ...
