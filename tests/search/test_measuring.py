"""Who is to blame for a measurement that failed: a trial only where it is the trial, whatever was killed or lost."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planish.compilers.compiler import RunError
from planish.compilers.remote import DeviceLost
from planish.hwmodels.device import parse_device
from planish.hwmodels.measurement import Measurement, MeasureProtocol
from planish.search import measuring
from planish.search.config import load_spec
from planish.search.errors import UserError
from planish.search.reachable import check_answers
from planish.search.workers import Failure

BOARD = parse_device("rpc://board:9090/cpu")
FOUND = {"original": Measurement(BOARD.name, (1.0,))}


def lost(times: int, waited: list[float], patch: pytest.MonkeyPatch) -> Callable[[], Mapping[str, Measurement]]:
    """A measurement whose device is lost so many times."""
    patch.setattr(time, "sleep", waited.append)
    left = [times]

    def measure() -> Mapping[str, Measurement]:
        if left[0]:
            left[0] -= 1
            raise DeviceLost("device rpc://board:9090/cpu is lost: nothing answers at board:9090 (Connection refused)")
        return FOUND

    return measure


def test_one_that_comes_back_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    assert measuring.waiting_for(BOARD.name, lost(19, waited, monkeypatch)) == FOUND
    # The restart of a board takes minutes.
    assert 180 <= sum(waited) <= 600


def test_one_that_does_not_ends_the_search_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    with pytest.raises(UserError, match=r"Connection refused\), 20 times in a row; .* give the same command again"):
        measuring.waiting_for(BOARD.name, lost(20, waited, monkeypatch))
    assert len(waited) == 19


def test_on_a_device_that_is_only_described_nothing_is_timed_but_latency_may_be_predicted() -> None:
    described = parse_device("cpu/cascadelake")
    with pytest.raises(UserError, match=r"'cpu/cascadelake' is only described .* --set measure.latency=predicted, or"):
        check_answers([parse_device("cpu"), described], predicted=False)
    check_answers([parse_device("cpu"), described], predicted=True)


@pytest.mark.parametrize(("final", "runs", "processes"), [(True, 20, 4), (False, 7, 3)])
def test_a_search_spreads_its_runs_over_processes_and_a_front_is_timed_as_specified(
    final: bool, runs: int, processes: int
) -> None:
    asked: list[MeasureProtocol] = []

    class Timer:
        def measure(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Mapping[str, Measurement]:
            asked.append(protocol)
            return {name: Measurement("cpu", (2.0,)) for name in artifacts}

    spec = load_spec(None, {"model": "own", "data": "own", "measure.runs": 20, "measure.processes": 4})
    evaluator: Any = SimpleNamespace(
        spec=spec, devices={"cpu": parse_device("cpu")}, timers={"cpu": Timer()},
        artifact_folder=lambda folder, label, name: folder / name, asks_energy=False,
    )  # fmt: skip
    found = measuring.measure_trials(evaluator, {1: Path("1")}, Path("0"), "untrained", final=final)
    assert [(protocol.runs, protocol.processes) for protocol in asked] == [(runs, processes)]
    assert found[1] == {"latency_s": {"cpu": {"value": 2.0, "ci95": [2.0, 2.0]}}, "latency_ratio": {"cpu": 1.0}}


def timed_with(watts: Mapping[str, float | None], **arguments: Any) -> Mapping[str, object]:
    """Trial 1 on two devices where it takes 2 and 1 s, 4 and 2 relative to the original, and uses so many watts."""
    seconds = {"cpu": 2.0, "cpu?threads=2": 1.0}

    class Timer:
        def __init__(self, label: str) -> None:
            self.label = label

        def measure(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Mapping[str, Measurement]:
            own = Measurement(self.label, (seconds[self.label],), watts=watts[self.label])
            return {"original": Measurement(self.label, (0.5,), watts=9.0), "1": own}

    spec = load_spec(None, {"model": "own", "data": "own"})
    evaluator: Any = SimpleNamespace(
        spec=spec, devices={label: parse_device(label) for label in seconds}, asks_energy=True,
        timers={label: Timer(label) for label in seconds}, artifact_folder=lambda folder, label, name: folder / name,
    )  # fmt: skip
    found = measuring.measure_trials(evaluator, {1: Path("1")}, Path("0"), "untrained", final=False, **arguments)[1]
    assert isinstance(found, dict)
    assert "watts" not in found
    return found


def test_energy_is_what_the_counters_say_of_the_device_that_uses_the_most() -> None:
    found = timed_with({"cpu": 10.0, "cpu?threads=2": 15.0})
    assert (found["energy_j"], found["energy_measured"]) == (20.0, True)
    # Seconds are those relative to what the original took when it was recorded; joules belong to them.
    moved = timed_with({"cpu": 10.0, "cpu?threads=2": 15.0}, original_s={"cpu": 0.25, "cpu?threads=2": 0.5})
    assert moved["energy_j"] == 15.0


@pytest.mark.parametrize("watts", [None, 15.0])
def test_energy_stays_modelled_where_a_devices_counters_cannot_be_read_or_the_originals_was(
    watts: float | None,
) -> None:
    unread = timed_with({"cpu": None, "cpu?threads=2": watts})
    assert not {"energy_j", "energy_measured"} & set(unread)
    modelled = timed_with({"cpu": 10.0, "cpu?threads=2": watts}, energy_measured=False)
    assert not {"energy_j", "energy_measured"} & set(modelled)


def test_counters_that_cannot_be_read_any_more_end_the_search_with_a_line() -> None:
    with pytest.raises(UserError, match=r"cannot be read now: give the same command .* may read /sys/class/powercap"):
        timed_with({"cpu": None, "cpu?threads=2": 15.0}, energy_measured=True)


def blamed(fails: Callable[[int, list[str]], RunError | None]) -> tuple[Mapping[int, Any], list[list[str]]]:
    """What becomes of trials 1 to 9, and what was timed together, where `fails` says which call fails and how."""
    calls: list[list[str]] = []

    class Timer:
        def measure(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Mapping[str, Measurement]:
            calls.append(list(artifacts))
            error = fails(len(calls), calls[-1])
            if error is not None:
                raise error
            return {name: Measurement("cpu", (2.0,)) for name in artifacts}

    evaluator: Any = SimpleNamespace(
        spec=load_spec(None, {"model": "own", "data": "own"}), devices={"cpu": parse_device("cpu")},
        timers={"cpu": Timer()}, artifact_folder=lambda folder, label, name: folder / name, asks_energy=False,
    )  # fmt: skip
    folders = {number: Path(str(number)) for number in range(1, 10)}
    return measuring.measure_trials(evaluator, folders, Path("0"), "artifact", final=True), calls


@pytest.mark.parametrize("artifact", ["original", "3"])
def test_a_process_that_was_killed_once_costs_no_trial(artifact: str) -> None:
    found, _ = blamed(lambda call, names: RunError("killed", artifact, crashed=True) if call == 1 else None)
    assert sorted(found) == list(range(1, 10))
    assert not any(isinstance(result, Failure) for result in found.values())


def test_one_that_crashes_every_time_fails_alone() -> None:
    found, calls = blamed(lambda call, names: RunError("boom", "3", crashed=True) if "3" in names else None)
    assert [number for number, result in found.items() if isinstance(result, Failure)] == [3]
    assert sum("3" in names for names in calls) == 2


def test_one_that_breaks_the_process_of_the_original_fails_alone() -> None:
    found, calls = blamed(lambda call, names: RunError("boom", "original") if "3" in names else None)
    assert [number for number, result in found.items() if isinstance(result, Failure)] == [3]
    assert ["original"] in calls


def test_an_original_that_cannot_be_timed_any_more_ends_the_search_with_a_line() -> None:
    with pytest.raises(UserError, match=r"cannot be timed any more \(it is gone\); what was recorded is kept"):
        blamed(lambda call, names: RunError("it is gone", "original"))
    with pytest.raises(UserError, match="cannot be timed any more"):
        blamed(lambda call, names: RunError("it is gone"))


def test_a_full_disk_is_no_fault_of_a_trial() -> None:
    def full(call: int, names: list[str]) -> RunError | None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"the disk is full; what was recorded is kept"):
        blamed(full)


def test_the_interval_of_a_ratio_has_the_spread_of_the_original_too() -> None:
    class Timer:
        def measure(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Mapping[str, Measurement]:
            runs = {"original": (0.9, 1.0, 1.1), "1": (1.9, 2.0, 2.2)}
            return {name: Measurement("cpu", runs[name]) for name in artifacts}

    evaluator: Any = SimpleNamespace(
        spec=load_spec(None, {"model": "own", "data": "own"}), devices={"cpu": parse_device("cpu")},
        timers={"cpu": Timer()}, artifact_folder=lambda folder, label, name: folder, asks_energy=False,
    )  # fmt: skip
    folders = {0: Path("0"), 1: Path("1")}
    found = measuring.measure_trials(evaluator, folders, Path("0"), "artifact", final=True, original_s={"cpu": 3.0})
    original, other = (dict[str, Any](result) for result in found.values() if isinstance(result, dict))
    # A model beside itself has its own spread alone.
    assert original["latency_s"]["cpu"] == {"value": 3.0, "ci95": pytest.approx([2.7, 3.3])}
    assert original["latency_ratio"] == {"cpu": 1.0}
    # Relative half widths add up as those of independent figures do: 1/1.9 and 1.1 below, 1.1 and 1/0.9 above.
    below, above = math.hypot(2 / 1.9 - 1, 0.1), math.hypot(0.1, 1 / 0.9 - 1)
    assert other["latency_s"]["cpu"]["value"] == pytest.approx(6.0)
    assert other["latency_s"]["cpu"]["ci95"] == pytest.approx([6 / (1 + below), 6 * (1 + above)])
