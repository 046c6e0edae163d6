"""Steps of a trial that may fail without costing what was done before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planish.compilers.compiler import RunError
from planish.hwmodels.device import parse_device
from planish.hwmodels.measurement import MeasureProtocol
from planish.search.config import load_spec
from planish.search.ledger import Ledger
from planish.search.progress import Progress
from planish.search.rundir import RunDirectory
from planish.search.steps import SLOW_SITES, Steps
from planish.spaces import Choice, Kind, SearchSpace

SPACE = SearchSpace((Choice("a", Kind.BITS, (None, 8)), Choice("b", Kind.BITS, (None, 8))), {})


class Timer:
    """Knows the seconds of site `a` of every artifact; some end the process that they are timed in."""

    def __init__(self, broken: set[str]) -> None:
        self.broken = broken
        self.calls: list[list[str]] = []

    def site_times(
        self, artifacts: Mapping[str, Path], protocol: MeasureProtocol
    ) -> Mapping[str, list[tuple[str, str, float]]]:
        self.calls.append(list(artifacts))
        if hit := self.broken & set(artifacts):
            raise RunError("it took too long", min(hit))
        return {name: [("kernel", "a", 2e-6 if name == "0" else 3e-6)] for name in artifacts}


def explained(folder: Path, broken: set[str]) -> tuple[dict[int, object], Timer]:
    """What is written of trials 1 to 3, whose site `a` has 8 bits, and is slower for it."""
    spec = load_spec(None, {"model": "m", "data": "d"})
    with RunDirectory.create(folder, spec, {}) as run:
        ledger, timer = Ledger(run, spec), Timer(broken)
        ledger.start(0, SPACE.original(), 0)
        for number in (1, 2, 3):
            ledger.start(number, SPACE.decode([1, number % 2]), 1)
        evaluator: Any = SimpleNamespace(
            spec=spec, devices={"cpu": parse_device("cpu")}, timers={"cpu": timer},
            artifact_folder=lambda folder, label, name: folder / name,
        )  # fmt: skip
        Steps(evaluator, ledger, Progress(None)).explain([1, 2, 3])
        files = {n: run.trial_folder(n) / SLOW_SITES for n in (1, 2, 3)}
        return {n: json.loads(file.read_text()) for n, file in files.items() if file.exists()}, timer


def test_sites_that_got_no_faster_are_named(tmp_path: Path) -> None:
    found, timer = explained(tmp_path / "run", set())
    assert sorted(found) == [1, 2, 3]
    assert all(isinstance(reasons, dict) and "a" in reasons for reasons in found.values())
    assert len(timer.calls) == 1


@pytest.mark.parametrize(("broken", "left"), [({"2"}, [1, 3]), ({"0"}, []), ({"1", "2", "3"}, [])])
def test_one_whose_kernels_cannot_be_timed_stays_without_reasons(
    tmp_path: Path, broken: set[str], left: list[int]
) -> None:
    found, _ = explained(tmp_path / "run", broken)
    assert sorted(found) == left
    # Carried on, what is known is not timed again.
    again, timer = explained(tmp_path / "run", set())
    assert sorted(again) == [1, 2, 3]
    assert not {str(number) for number in left} & {name for names in timer.calls for name in names}
