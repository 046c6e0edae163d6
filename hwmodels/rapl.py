"""The energy that a processor says it has used (RAPL), where Linux shows it and its files may be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("/sys/class/powercap")
_PACKAGE = "package"


@dataclass(frozen=True)
class EnergyCounters:
    """The counters of all packages: cores, caches and what else is on the chip, whoever uses it.

    Attributes:
        zones: The folder of every package's counter, and the microjoules at which it begins again.
    """

    zones: tuple[tuple[Path, int], ...]

    @staticmethod
    def here(root: Path = ROOT) -> EnergyCounters | None:
        """This machine's; None where there are none or they may not be read, as for most users since 2020."""
        # By package: some processors show the same one by two ways ("intel-rapl:0" and "intel-rapl-mmio:0").
        zones: dict[str, tuple[Path, int]] = {}
        try:
            for zone in sorted(root.iterdir()):
                file = zone / "name"
                name = file.read_text(encoding="ascii").strip() if file.is_file() else ""
                if name.startswith(_PACKAGE) and name not in zones:
                    zones[name] = zone, int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
                    int((zone / "energy_uj").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        return EnergyCounters(tuple(zones.values())) if zones else None

    def read(self) -> tuple[int, ...]:
        """Microjoules of every package, from some time on."""
        return tuple(int((zone / "energy_uj").read_text(encoding="ascii")) for zone, _ in self.zones)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """What was used between two readings, of which a counter began again once at most."""
        used = 0
        for (_, limit), first, last in zip(self.zones, before, after, strict=True):
            used += last - first if last >= first else last - first + limit
        return used * 1e-6


@dataclass
class PowerMeter:
    """The mean power while something was running, summed up over many short times; of nothing without counters.

    `clock` gives seconds, from any start.
    """

    counters: EnergyCounters | None
    clock: Callable[[], float] = time.perf_counter
    joules: float = 0.0
    seconds: float = 0.0
    _begun: tuple[float, tuple[int, ...]] = field(default=(0.0, ()))

    def begin(self) -> None:
        """What follows counts."""
        if self.counters is not None:
            self._begun = self.clock(), self.counters.read()

    def end(self) -> None:
        """What was since `begin` counts."""
        if self.counters is not None:
            start, before = self._begun
            self.joules += self.counters.joules(before, self.counters.read())
            self.seconds += self.clock() - start

    @property
    def watts(self) -> float | None:
        """Joules by seconds; None where nothing was counted."""
        return self.joules / self.seconds if self.joules > 0 and self.seconds > 0 else None
