"""A device that does not answer costs no trial: it is waited for, then the search ends with a line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planish.compilers.remote import DeviceLost
from planish.hwmodels.device import parse_device
from planish.hwmodels.measurement import Measurement, MeasureProtocol
from planish.search import measuring
from planish.search.config import load_spec
from planish.search.errors import UserError
from planish.search.reachable import check_answers

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
        artifact_folder=lambda folder, label, name: folder / name,
    )  # fmt: skip
    found = measuring.measure_trials(evaluator, {1: Path("1")}, Path("0"), "untrained", final=final)
    assert [(protocol.runs, protocol.processes) for protocol in asked] == [(runs, processes)]
    assert found[1] == {"latency_s": {"cpu": {"value": 2.0, "ci95": [2.0, 2.0]}}, "latency_ratio": {"cpu": 1.0}}
