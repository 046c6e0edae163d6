"""What a run knows of its trials."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from planish.search.config import load_spec
from planish.search.errors import UserError
from planish.search.ledger import Ledger
from planish.search.rundir import RunDirectory
from planish.search.trial import State
from planish.spaces.space import Candidate


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    spec = load_spec(None, {"model": "digits-resnet", "data": "digits32"})
    with RunDirectory.create(tmp_path / "run", spec, {}) as folder:
        yield Ledger(folder, spec)


def test_a_trial_starts_once_and_ends_once(ledger: Ledger) -> None:
    ledger.start(1, Candidate({"a:bits": 8}), 0)
    ledger.start(1, Candidate({"a:bits": 4}), 3)
    assert ledger.candidate(1) == Candidate({"a:bits": 8})
    assert ledger.running([1]) == [1]
    ledger.finish(1, State.COMPLETE, metrics={"accuracy": 0.5})
    ledger.stop(1)
    assert ledger.state(1) is State.COMPLETE
    assert ledger.metrics(1)["accuracy"] == 0.5


def test_what_was_recorded_is_seen_at_once_and_after_a_restart(ledger: Ledger) -> None:
    ledger.start(2, Candidate({"a:bits": 8}), 1)
    ledger.folder.score(2, {"accuracy": 0.25})
    assert ledger.records[2].score == {"accuracy": 0.25}
    again = RunDirectory.open(ledger.folder.path).history()
    assert again.records == ledger.records
    assert again.phases == ledger.folder.phases


def test_a_failure_on_a_full_disk_is_not_held_against_the_trial(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.start(1, Candidate({}), 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100 * 1024))
    with pytest.raises(
        UserError, match=r"is full \(100 KB left\), so trial 1 failed: the linker died; .* planish resume"
    ):
        ledger.fail(1, "the linker died")
    assert ledger.state(1) is State.RUNNING
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**30))
    ledger.fail(1, "the linker died")
    assert ledger.state(1) is State.FAILED


@pytest.mark.parametrize("measured", [True, False])
def test_how_the_originals_energy_is_known_is_how_every_trials_is(ledger: Ledger, measured: bool) -> None:
    ledger.start(0, Candidate({}), 0)
    ledger.folder.score(0, {"energy_j": 1e-6})
    assert ledger.energy_measured() is None
    found: dict[str, object] = {"energy_j": 2.0, "energy_measured": True} if measured else {}
    ledger.folder.measure(0, "cpu", {"latency_s": {"cpu": {"value": 0.5}}, **found})
    assert ledger.energy_measured() is measured
    assert ledger.original["energy_j"] == (2.0 if measured else 1e-6)


def test_the_tightest_of_several_budgets_is_the_limit_and_what_is_not_traded_off_is_told(tmp_path: Path) -> None:
    budget = ["size<=0.5x", "size<=300B", "latency<=0.8x", "accuracy>=0.5"]
    spec = load_spec(None, {"model": "digits-resnet", "data": "digits32", "budget": budget})
    known = {"accuracy": 0.9, "size_bytes": 1000, "latency_s": {"cpu": {"value": 2.0}}, "divergence": 0.0}
    with RunDirectory.create(tmp_path / "run", spec, {}) as folder:
        ledger = Ledger(folder, spec)
        for number, share in ((0, 1.0), (1, 0.25)):
            ledger.start(number, Candidate({"a:bits": 8 if number else None}), 0)
            folder.score(number, {**known, "size_bytes": share * 1000, "divergence": 0.5 * number})
        assert ledger.limits() == {"size": 0.3, "latency[cpu]": 0.8}
        candidate, values, attributes = ledger.told(1)
    assert candidate.options == {"a:bits": 8}
    assert values == [0.9, 2.0]
    assert attributes == {"divergence": 0.5, "cost size": 0.25}
