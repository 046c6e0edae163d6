"""What is proposed depends neither on how many workers there are nor on which is faster nor on where a kill fell."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.search.tables import table_for

from planish.search.batches import Batches
from planish.search.config import load_spec
from planish.search.errors import UserError
from planish.search.ledger import Ledger
from planish.search.objective import objectives_of
from planish.search.planish_sampler import SamplerTask
from planish.search.progress import Progress
from planish.search.rundir import RunDirectory
from planish.search.sampler import Proposer, opening, uniform_policies
from planish.search.steps import Steps
from planish.search.trial import State
from planish.search.workers import Failure
from planish.spaces.space import Candidate, Choice, Kind, SearchSpace

SPACE = SearchSpace(
    tuple(
        choice
        for site in range(4)
        for choice in (
            Choice(f"s{site}", Kind.PRUNE, (None, 0.25, 0.5, 0.75)),
            Choice(f"s{site}", Kind.BITS, (None, 8, 4)),
        )
    ),
    {},
)
TRIALS = 17


class Killed(BaseException):
    """The controller is no more."""


class Workers:
    """So many workers that take random times; the controller is killed after so many evaluations."""

    def __init__(self, count: int, seed: int, kill_after: int | None = None) -> None:
        self.count, self.rng, self.left = count, random.Random(seed), kill_after
        self.evaluated: list[int] = []
        self.most = 0

    def run(self, method: str, jobs: Any, done: Callable[[Any, Any], None]) -> None:
        waiting = iter(jobs)
        self.stream(method, lambda: next(waiting, None), done)

    def stream(self, method: str, more: Callable[[], Any], done: Callable[[Any, Any], None]) -> None:
        running: list[Any] = []
        while True:
            while len(running) < self.count and (work := more()) is not None:
                running.append(work[0])
            self.most = max(self.most, len(running))
            if not running:
                return
            job = running.pop(self.rng.randrange(len(running)))
            if self.left is not None:
                if self.left == 0:
                    raise Killed
                self.left -= 1
            self.evaluated.append(job.number)
            done(job, metrics(job.candidate))


def metrics(candidate: Candidate) -> Any:
    options = candidate.options
    if options["s0:bits"] == 4 and options["s1:bits"] == 4:
        return Failure("no kernel")
    pruned = sum(float(o) for name, o in options.items() if o and name.endswith("prune")) / 3
    bits = sum(o is not None for name, o in options.items() if name.endswith("bits")) / 4
    latency = 1e-3 * (1 - 0.6 * pruned) * (1 - 0.3 * bits)
    return {
        "accuracy": 0.9 - 0.2 * pruned**2 - 0.05 * bits,
        "divergence": pruned + bits + 0.01,
        "latency_s": {"cpu": {"value": latency, "ci95": [latency, latency]}},
    }


def searched(folder: Path, workers: Workers, sampler: str, ahead: int, opens: int | None = None) -> list[str]:
    """A search with simulated workers, or the rest of one; the keys of all candidates in the order of their numbers.

    `opens` is how many candidates `planish` is asked to open with; None: as many as it does.
    """
    spec = load_spec(
        None,
        {
            "model": "m", "data": "d", "measure.latency": "predicted", "search.trials": TRIALS, "search.batch": 4,
            "search.ahead": ahead, "sampler": sampler, "distill.rungs": (1,), "distill.survivors": (1,),
        },
    )  # fmt: skip
    with RunDirectory.create(folder, spec, {}) as run:
        ledger = Ledger(run, spec)
        if not ledger.records:
            ledger.start(0, SPACE.original(), 0)
            run.score(0, metrics(SPACE.original()))
            ledger.finish(0, State.COMPLETE)
        task = SamplerTask(table_for(SPACE), objectives_of(("accuracy", "latency"), ("cpu",)), (0.9, 1e-3), {}, 10)
        evaluator: Any = SimpleNamespace(spec=spec, devices={"cpu": None})
        steps = Steps(evaluator, ledger, Progress(None))
        proposer = Proposer(
            folder / "study.log", SPACE, sampler, 0, ("maximize", "minimize"),
            task=None if sampler == "planish" else task,
        )  # fmt: skip
        pool: Any = workers
        try:
            batches = Batches(ledger, steps, proposer, 1)
            if sampler == "planish":
                batches.opening(pool, opening(sampler, 4, TRIALS) if opens is None else opens)
                proposer.inform(task)
            batches.rest(pool)
        finally:
            proposer.close()
        assert sum(r.score is not None or r.trial.state is State.FAILED for r in ledger.records.values()) == TRIALS + 1
        return [ledger.candidate(number).key() for number in sorted(ledger.records)]


@pytest.mark.parametrize("sampler", ["planish", "random", "nsga2", "tpe"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_any_number_of_workers_of_any_speed_gets_the_same_candidates(tmp_path: Path, sampler: str, ahead: int) -> None:
    found = [
        searched(tmp_path / str(count), Workers(count, seed), sampler, ahead)
        for seed, count in enumerate((1, 8) if sampler == "planish" else (1, 2, 8))
    ]
    assert all(keys == found[0] for keys in found)
    assert len(set(found[0])) == TRIALS + 1


@pytest.mark.parametrize("sampler", ["planish", "random", "nsga2", "tpe"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_search_that_was_killed_anywhere_goes_on_as_it_would_have_and_repeats_nothing(
    tmp_path: Path, sampler: str, ahead: int
) -> None:
    undisturbed = searched(tmp_path / "undisturbed", Workers(3, 0), sampler, ahead)
    for cut in (5, 14) if sampler == "planish" else (0, 5, 11, 16):
        folder, first, rest = tmp_path / str(cut), Workers(3, cut, cut), Workers(2, cut)
        with pytest.raises(Killed):
            searched(folder, first, sampler, ahead)
        assert searched(folder, rest, sampler, ahead) == undisturbed
        assert sorted(first.evaluated + rest.evaluated) == list(range(1, TRIALS + 1))


def test_an_opening_of_fewer_policies_than_asked_for_is_a_batch_of_its_own_after_a_kill_too(tmp_path: Path) -> None:
    asked = len(uniform_policies(SPACE)) + 3
    assert asked < TRIALS
    undisturbed = searched(tmp_path / "undisturbed", Workers(3, 0), "planish", 0, asked)
    for cut in (asked - 3, TRIALS - 1):
        folder = tmp_path / str(cut)
        with pytest.raises(Killed):
            searched(folder, Workers(3, cut, cut), "planish", 0, asked)
        assert searched(folder, Workers(2, cut), "planish", 0, asked) == undisturbed


def test_batches_are_as_long_as_the_journal_has_them(tmp_path: Path) -> None:
    """A run of a version that opened with more candidates goes on without a difference in what is known."""
    with pytest.raises(Killed):
        searched(tmp_path / "run", Workers(3, 0, 9), "planish", 0, 4)
    before = RunDirectory.open(tmp_path / "run").trials()
    searched(tmp_path / "run", Workers(3, 1), "planish", 0, 2)
    after = RunDirectory.open(tmp_path / "run").trials()
    assert [(t.candidate, t.batch) for t in after[: len(before)]] == [(t.candidate, t.batch) for t in before]


def test_workers_need_not_wait_for_the_slowest_of_a_batch(tmp_path: Path) -> None:
    waiting, ahead = Workers(12, 0), Workers(12, 0)
    searched(tmp_path / "a", waiting, "random", 0)
    searched(tmp_path / "b", ahead, "random", 2)
    assert waiting.most == 4
    assert ahead.most == 12


def test_batches_ahead_are_refused_where_candidates_are_timed() -> None:
    with pytest.raises(UserError, match=r"search\.ahead = 2 .* measure\.latency"):
        load_spec(None, {"model": "m", "data": "d", "search.ahead": 2})


@pytest.mark.parametrize("cut", [1, 3, 5, 9])
def test_a_kill_between_a_score_and_its_time_cuts_nothing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    undisturbed = searched(tmp_path / "undisturbed", Workers(3, 0), "random", 2)
    timed = Steps.measure
    left = [cut]

    def killed(self: Steps, numbers: Any, name: str, fatal: bool = False) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        timed(self, numbers, name, fatal)

    monkeypatch.setattr(Steps, "measure", killed)
    with pytest.raises(Killed):
        searched(tmp_path / "killed", Workers(3, 1), "random", 2)
    monkeypatch.setattr(Steps, "measure", timed)
    assert searched(tmp_path / "killed", Workers(2, 2), "random", 2) == undisturbed
