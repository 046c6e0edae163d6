"""When a machine is too busy to measure on."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from planish.hwmodels.load import BusyMachine, LoadWatch, refusal, wait_for_quiet


@pytest.mark.parametrize(
    ("others", "threads", "cores", "refused"),
    [
        (0.0, 1, 2, False),
        (1.0, 1, 2, False),
        (1.9, 1, 2, True),
        (1.33, 1, 2, True),  # two that never rest
        (0.9, 2, 2, True),
        (0.2, 2, 2, False),
        (0.9, 1, 1, True),
    ],
)
def test_measuring_needs_as_many_free_cores_as_threads(others: float, threads: int, cores: int, refused: bool) -> None:
    reason = refusal(others, threads, cores)
    assert (reason is not None) == refused
    if reason:
        assert f"{others:.1f} of {cores} cores" in reason
        assert "try again" in reason


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_what_this_process_and_its_children_use_is_not_others() -> None:
    # With every core of the machine for itself, own work that counted as others' would make one core at least.
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_spin, args=(1.5,))
    with LoadWatch(cores=1) as idle:
        time.sleep(0.5)
    with LoadWatch(cores=1) as watch:
        child.start()
        _spin(1.5)
        child.join()
    assert watch.others < idle.others + 0.6


def test_a_busy_machine_is_refused_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.hwmodels.load._own_s", lambda: 0.0)
    monkeypatch.setattr("planish.hwmodels.load._busy_s", lambda: 100 * time.monotonic())
    with pytest.raises(BusyMachine, match="stop them and try again"):
        wait_for_quiet(1, wait_s=0.1, look_s=0.05)


def test_an_idle_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    cores = os.cpu_count() or 1
    # Busy for the first 0.3 seconds, then idle.
    busy = lambda: 2 * cores * min(time.monotonic() - start, 0.3)  # noqa: E731
    monkeypatch.setattr("planish.hwmodels.load._own_s", lambda: 0.0)
    monkeypatch.setattr("planish.hwmodels.load._busy_s", busy)
    wait_for_quiet(1, wait_s=5.0, look_s=0.1)
    assert time.monotonic() - start >= 0.2
