"""What of the devices' vectors a search space is made for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..hwmodels.device import Device


@dataclass(frozen=True)
class Vectors:
    """Whoever works for a run has to propose its very space, whatever processor he has himself.

    Attributes:
        lanes: Channels that widths are rounded to.
        bfloat16: Whether weights and inputs may be bfloat16.
    """

    lanes: int
    bfloat16: bool

    @staticmethod
    def of(devices: Iterable[Device], lanes: int = 0) -> Vectors:
        """Those of devices; `lanes` as a specification says, 0 for the widest device's."""
        known = list(devices)
        return Vectors(
            lanes or max(device.lanes for device in known), any("avx512_bf16" in device.features for device in known)
        )
