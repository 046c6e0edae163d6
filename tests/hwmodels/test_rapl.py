"""Energy counters against files as Linux writes them: two packages, one that begins again, none that may be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.hwmodels.rapl import EnergyCounters, PowerMeter


def zone(root: Path, folder: str, name: str, microjoules: int, limit: int = 262143328850) -> Path:
    """A zone as /sys/class/powercap has it."""
    made = root / folder
    made.mkdir(parents=True)
    (made / "name").write_text(name + "\n")
    (made / "max_energy_range_uj").write_text(f"{limit}\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    return made


def test_packages_are_summed_and_parts_of_them_are_not(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 900_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 300_000)
    (tmp_path / "intel-rapl").mkdir()  # the control type has no name
    counters = EnergyCounters.here(tmp_path)
    assert counters is not None
    before = counters.read()
    assert before == (1_000_000, 5_000_000)
    (first / "energy_uj").write_text("3500000\n")
    (second / "energy_uj").write_text("5000001\n")
    assert counters.joules(before, counters.read()) == pytest.approx(2.500001)


def test_a_package_that_is_shown_twice_counts_once(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    counters = EnergyCounters.here(tmp_path)
    assert counters is not None
    assert counters.read() == (1_000_000,)


def test_a_counter_that_began_again_counts_on(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0, limit=1_000_000)
    counters = EnergyCounters.here(tmp_path)
    assert counters is not None
    assert counters.joules((999_000,), (500,)) == pytest.approx(1500e-6)


@pytest.mark.parametrize("fault", ["no folder", "no package", "no energy", "no number"])
def test_where_nothing_can_be_read_there_are_no_counters(tmp_path: Path, fault: str) -> None:
    root = tmp_path / "powercap"
    if fault != "no folder":
        made = zone(root, "intel-rapl:0", "dram" if fault == "no package" else "package-0", 7)
        if fault == "no energy":
            (made / "energy_uj").unlink()
        if fault == "no number":
            (made / "energy_uj").write_text("no data\n")
    assert EnergyCounters.here(root) is None


def test_power_is_energy_by_time_of_what_was_counted_alone(tmp_path: Path) -> None:
    made = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    clock = [0.0]
    meter = PowerMeter(EnergyCounters.here(tmp_path), clock=lambda: clock[0])
    assert meter.watts is None
    energy = 0
    for seconds, used, counted in ((2.0, 30_000_000, True), (5.0, 400_000_000, False), (1.0, 15_000_000, True)):
        if counted:
            meter.begin()
        clock[0] += seconds
        energy += used
        (made / "energy_uj").write_text(f"{energy}\n")
        if counted:
            meter.end()
    assert meter.watts == pytest.approx(15.0)


def test_without_counters_there_is_no_power() -> None:
    meter = PowerMeter(None)
    meter.begin()
    meter.end()
    assert meter.watts is None
