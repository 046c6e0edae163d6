"""A run's state, from its folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.search.config import load_spec
from planish.search.front import Entry, front_document
from planish.search.journal import Event
from planish.search.objective import objectives_of
from planish.search.replay import replay
from planish.search.rundir import RunDirectory
from planish.search.status import _eta_s, done_times, status
from planish.search.trial import State, Trial
from planish.spaces import Choice, Kind, SearchSpace

SPACE = SearchSpace((Choice("a", Kind.PRUNE, (0.0, 0.25, 0.5)),), {})


def _metrics(accuracy: float, latency_s: float) -> dict[str, object]:
    return {"accuracy": accuracy, "latency_s": {"cpu": {"value": latency_s, "ci95": None}}}


def _trial(number: int, state: State, metrics: dict[str, object]) -> Trial:
    return Trial(number, SPACE.decode([number]), state, metrics, None, 0)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    spec = load_spec(None, {"model": "m", "data": "d", "budget": "latency<=0.5x"})
    return RunDirectory.create(tmp_path / "r", spec, {})


def test_a_new_run_has_nothing_done(run: RunDirectory) -> None:
    state = status(run.path)
    assert (state["phase"], state["done"], state["best"], state["trials"]) == ("new", 0, None, {})


def test_a_working_controller_is_named_and_a_stopped_one_is_not(run: RunDirectory) -> None:
    assert "planish process" in str(status(run.path)["controller"])
    run.close()
    assert status(run.path)["controller"] is None
    assert status(run.path)["eta_s"] is None


def test_done_counts_scored_trials_and_those_that_failed_before(run: RunDirectory) -> None:
    run.phase("search", 10, "score")
    for number in range(3):
        run.append(_trial(number, State.RUNNING, {}))
    run.score(0, {})
    run.append(_trial(0, State.COMPLETE, {}))
    run.append(_trial(1, State.FAILED, {}))
    state = status(run.path)
    assert (state["phase"], state["done"], state["total"]) == ("search", 2, 10)
    assert state["trials"] == {"complete": 1, "failed": 1, "running": 1}


def test_best_so_far_is_the_most_accurate_score_within_the_budget_and_not_the_original(run: RunDirectory) -> None:
    run.write_space(SPACE)
    for number, metrics in enumerate([_metrics(0.9, 1.0), _metrics(0.85, 0.6), _metrics(0.7, 0.5)]):
        run.append(_trial(number, State.RUNNING, {}))
        run.score(number, metrics)
    best = status(run.path)["best"]
    assert isinstance(best, dict)
    assert (best["trial"], best["final"]) == (2, False)


def test_the_front_goes_before_the_scores(run: RunDirectory) -> None:
    original = Entry(_trial(0, State.COMPLETE, _metrics(0.9, 1.0)), measured=True)
    entry = Entry(_trial(1, State.COMPLETE, _metrics(0.8, 0.4)), measured=True)
    run.write_front(front_document(objectives_of(["accuracy", "latency"], ["cpu"]), [], original, [entry]))
    state = status(run.path)
    best = state["best"]
    assert isinstance(best, dict)
    assert (best["trial"], best["final"], state["front"]) == (1, True, 2)


def test_time_left_is_at_the_pace_of_this_session_alone() -> None:
    events: list[dict[str, object]] = [{"event": "phase", "phase": "search", "total": 10, "unit": "end", "time": 0.0}]
    moments = [100.0, 200.0, 10_000.0, 10_020.0]
    for number, moment in enumerate(moments):
        if number == 2:
            # Resumed after a long rest: 10 s an item since.
            events.append({"event": "session", "time": 9_990.0})
        start = {"event": "start", "trial": number, "batch": 0, "seed": 0, "options": {}, "time": 0.0}
        end = {"event": "end", "trial": number, "state": "complete", "metrics": {}, "error": None, "time": moment}
        events += [start, end]
    history = replay([Event(line, data) for line, data in enumerate(events, start=1)], Path("trials.jsonl"))
    # Two items in 30 s, six to go.
    phase = history.phases[-1]
    assert _eta_s(history, phase, done_times(history, phase)) == pytest.approx(90)


def test_a_phase_counts_its_own_items_and_those_that_failed_in_it(run: RunDirectory) -> None:
    for number in range(3):
        run.append(_trial(number, State.RUNNING, {}))
    run.phase("distill to epoch 1", 3, "rung")
    run._journal._clock = lambda: 4e9  # type: ignore[union-attr]
    for number in range(3):
        run.rung(number, 0, 1, {})
    run._journal._clock = lambda: 5e9  # type: ignore[union-attr]
    run.phase("distill to epoch 3", 3, "rung")
    assert status(run.path)["done"] == 0
    run.rung(0, 1, 3, {})
    run.append(_trial(1, State.FAILED, {}))
    run.append(_trial(2, State.STOPPED, {}))
    assert status(run.path)["done"] == 2


def test_while_the_original_is_timed_there_is_no_best(run: RunDirectory) -> None:
    run.write_space(SPACE)
    run.append(_trial(0, State.RUNNING, {}))
    run.score(0, {"accuracy": 0.9})
    state = status(run.path)
    assert (state["best"], state["trials"]) == (None, {"running": 1})
