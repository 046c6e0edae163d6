"""Who is to blame when workers die: a candidate that kills its worker again and again, never one whose Ray is dying."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planish.search.config import load_spec
from planish.search.errors import UserError
from planish.search.evaluate import Job
from planish.search.workers import Failure, Pool, Shared
from planish.spaces.space import Candidate


class RayActorError(Exception):
    pass


class ActorUnavailableError(RayActorError):
    pass


class Ray:
    """What a pool uses of Ray, in this process; `act` says what becomes of a call: a result or an exception.

    Its second argument is the job's number, None for the question whether the worker is there.
    """

    class exceptions:  # Ray's name
        RayActorError = RayActorError
        ActorUnavailableError = ActorUnavailableError
        OutOfMemoryError = type("OutOfMemoryError", (Exception,), {})
        RayTaskError = type("RayTaskError", (Exception,), {})

    def __init__(self, act: Callable[[str, int | None], Any]) -> None:
        self.act = act
        self.results: dict[object, Any] = {}
        self.calls: list[tuple[str, int | None]] = []
        self.alive = True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "own")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "own", "Alive": self.alive}, {"NodeID": "other", "Alive": True}]

    def wait(self, references: list[object], num_returns: int) -> tuple[list[object], list[object]]:
        return references[:1], references[1:]

    def get(self, reference: object) -> Any:
        result = self.results.pop(reference)
        if isinstance(result, Exception):
            raise result
        return result

    def actor(self, name: str) -> Any:
        class Remote:
            def __init__(self, number: Callable[..., int | None]) -> None:
                self.number = number

            def remote(remote, *arguments: Any) -> object:
                number = remote.number(*arguments)
                reference = object()
                self.calls.append((name, number))
                self.results[reference] = self.act(name, number)
                return reference

        class Actor:
            call = Remote(lambda shared, method, job, arguments: job.number)
            answer = Remote(lambda: None)

        return Actor()


def run(
    act: Callable[[str, int | None], Any], jobs: int, patch: pytest.MonkeyPatch, workers: int = 2, alive: bool = True
) -> Any:
    """What two workers make of so many jobs: results by number, and the calls."""
    passed = [0.0]
    patch.setattr(time, "sleep", lambda seconds: passed.__setitem__(0, passed[0] + seconds))
    patch.setattr(time, "monotonic", lambda: passed[0] + 1)
    ray = Ray(act)
    ray.alive = alive
    pool = object.__new__(Pool)
    pool._ray, pool._busy = ray, set()
    pool._shared = Shared(load_spec(None, {"model": "digits-resnet", "data": "digits32"}))
    pool._actors = [ray.actor(f"w{number}") for number in range(workers)]
    results: dict[int, Any] = {}
    pool.run(
        "score",
        [(Job(n, Candidate({}), 0, Path()), ()) for n in range(jobs)],
        lambda job, r: results.update({job.number: r}),
    )
    return results, ray.calls


def test_every_job_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    results, calls = run(lambda worker, number: {"n": number}, 5, monkeypatch)
    assert results == {n: {"n": n} for n in range(5)}
    assert sorted(number for _, number in calls) == list(range(5))


def test_a_candidate_that_kills_its_worker_three_times_has_failed_and_the_others_have_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results, calls = run(lambda worker, n: RayActorError("died") if n == 1 else {"n": n}, 4, monkeypatch)
    assert isinstance(results.pop(1), Failure)
    assert results == {n: {"n": n} for n in (0, 2, 3)}
    assert [number for _, number in calls].count(1) == 3


def test_a_worker_that_died_gets_no_job_before_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    _, calls = run(lambda worker, n: RayActorError("died") if n == 0 else {"n": n}, 6, monkeypatch, workers=1)
    after = [later for (_, number), (_, later) in pairwise(calls) if number == 0]
    assert after == [None, None, None]


def test_where_nobody_answers_no_candidate_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself dies: every process does, again and again."""
    results: dict[int, Any] = {}

    def act(worker: str, number: int | None) -> Any:
        return RayActorError("died")

    with pytest.raises(UserError, match=r"no worker has answered for 300 s, the last because died; .* same command"):
        results, _ = run(act, 3, monkeypatch)
    assert not results


def test_where_the_node_of_the_search_itself_is_dead_it_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"Ray's process on this machine has died.*give the same command again"):
        run(lambda worker, number: RayActorError("its owner has died"), 3, monkeypatch, alive=False)


def test_one_that_could_not_be_reached_costs_its_candidate_no_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node was away for 100 calls, then the candidate's process died twice."""
    away, deaths = [100], [2]

    def act(worker: str, number: int | None) -> Any:
        if number == 0:
            if away[0]:
                away[0] -= 1
                return ActorUnavailableError("away")
            if deaths[0]:
                deaths[0] -= 1
                return RayActorError("died")
        return {"n": number}

    results, _ = run(act, 3, monkeypatch)
    assert results == {n: {"n": n} for n in range(3)}


def test_a_users_mistake_in_a_worker_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    error = Ray.exceptions.RayTaskError()
    error.cause = UserError("no such file")
    with pytest.raises(UserError, match="no such file"):
        run(lambda worker, number: error, 1, monkeypatch)
