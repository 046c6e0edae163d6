"""A search whose evaluations only take time: the product's controller, journal and sampler on simulated workers.

Nothing is built or trained: a worker is busy for a time from a real trace (`data/evaluation_seconds.json`, scaled),
and its metrics follow from the candidate's options. The trace there is of `planish search runs/digits.toml` on 2 cores:
32 evaluations (`faults.py --trace RUN` stores another). Time is simulated; what the controller itself needs is real
time and is added to it, because no worker gets its next candidate before the controller has come to it.
"""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

TRACE = Path(__file__).resolve().parent / "data" / "evaluation_seconds.json"
SITES = 20
ORIGINAL = {"accuracy": 0.95, "latency_s": {"cpu": {"value": 1e-3, "ci95": [1e-3, 1e-3]}}, "size_bytes": 1_000_000}


@dataclass
class Clock:
    """Simulated seconds; real ones of the controller are added."""

    now_s: float = 0.0
    # Real seconds until the first candidate was handed out or none was left, since the clock was made.
    asked_s: float = 0.0
    begun_s: float = field(default_factory=time.perf_counter)
    real_s: float = field(default_factory=time.perf_counter)
    overheads_s: list[float] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)

    def catch_up(self) -> None:
        """Adds the real time that went by, to the clock and to what the last evaluation cost the controller."""
        now = time.perf_counter()
        spent, self.real_s = now - self.real_s, now
        self.now_s += spent
        if self.overheads_s:
            self.overheads_s[-1] += spent

    def ended(self) -> None:
        """An evaluation ended: what follows is its cost."""
        self.overheads_s.append(0.0)
        self.catch_up()

    def utilisation(self, workers: int) -> float:
        """The share of the workers' time that they work, from the start until the last evaluation is handed out.

        What follows is the wait for the last ones to end, which no controller can shorten.
        """
        last = max((begin for begin, _ in self.spans), default=0.0)
        if last == 0:
            return 0.0
        return sum(min(end, last) - begin for begin, end in self.spans) / (workers * last)


class SimulatedPool:
    """Stands for `planish.search.workers.Pool`."""

    def __init__(self, workers: int, mean_s: float, clock: Clock, sites: int = SITES, seed: int = 0) -> None:
        durations = np.array(json.loads(TRACE.read_text(encoding="utf-8"))["seconds"])
        self._durations = durations / durations.mean() * mean_s
        self._rng = np.random.default_rng(seed)
        self._workers, self._clock, self._sites = workers, clock, sites

    def run(self, method: str, jobs: Any, done: Callable[[Any, Any], None]) -> None:
        """As the pool's."""
        waiting = iter(jobs)
        self.stream(method, lambda: next(waiting, None), done)

    def stream(self, method: str, more: Callable[[], Any], done: Callable[[Any, Any], None]) -> None:
        """As the pool's."""
        clock, running, idle, order = self._clock, [], self._workers, 0
        while True:
            clock.catch_up()
            while idle and (work := more()) is not None:
                clock.catch_up()
                clock.asked_s = clock.asked_s or clock.real_s - clock.begun_s
                duration = float(self._rng.choice(self._durations))
                clock.spans.append((clock.now_s, clock.now_s + duration))
                order += 1
                heapq.heappush(running, (clock.now_s + duration, order, work[0]))
                idle -= 1
            clock.catch_up()
            clock.asked_s = clock.asked_s or clock.real_s - clock.begun_s
            if not running:
                return
            ends, _, job = heapq.heappop(running)
            clock.now_s = max(clock.now_s, ends)
            idle += 1
            done(job, metrics_of(job.candidate, self._sites))
            clock.ended()


def simulate(
    folder: Path, *, trials: int, workers: int, mean_s: float, batch: int, ahead: int, sampler: str, sites: int = SITES
) -> dict[str, Any]:
    """A whole search phase in a new run folder, or the rest of one that is there.

    Returns:
        `overhead_s` (of every trial), `utilisation`, `span_s` (simulated), `ready_s` (real seconds until what an
        earlier session recorded is read and told, and the first new candidate, if any, is handed out).
    """
    from planish.search.batches import Batches
    from planish.search.config import load_spec
    from planish.search.ledger import Ledger
    from planish.search.planish_sampler import SamplerTask
    from planish.search.progress import Progress
    from planish.search.rundir import RunDirectory
    from planish.search.sampler import WITH_TABLE, Proposer
    from planish.search.steps import Steps
    from planish.search.trial import State

    clock = Clock()
    spec = load_spec(
        None,
        {
            "model": "digits-resnet", "data": "digits32", "measure.latency": "predicted", "search.trials": trials,
            "search.batch": batch, "search.ahead": ahead, "sampler": sampler, "distill.rungs": (1,),
            "distill.survivors": (1,),
        },
    )  # fmt: skip
    space = space_of(sites)
    with RunDirectory.create(folder, spec, {}) as run:
        ledger = Ledger(run, spec)
        if not ledger.records:
            ledger.start(0, space.original(), 0)
            run.score(0, ORIGINAL)
            run.measure(0, "cpu", {})
            ledger.finish(0, State.COMPLETE)
        steps = Steps(SimpleNamespace(spec=spec, devices={"cpu": None}), ledger, Progress(None))  # type: ignore[arg-type]
        table = table_of(space) if sampler in WITH_TABLE else None
        task = SamplerTask(table, spec.targets(), (0.95, 1e-3), {}, classes=10) if table else None
        proposer = Proposer(folder / "study.log", space, sampler, spec.seed, ("maximize", "minimize"), task=task)
        pool = SimulatedPool(workers, mean_s, clock, sites)
        Batches(ledger, steps, proposer, 1).rest(pool)  # type: ignore[arg-type]
        ready_s = clock.asked_s or time.perf_counter() - clock.begun_s
        proposer.close()
    return {
        "overhead_s": clock.overheads_s,
        "utilisation": clock.utilisation(workers),
        "span_s": clock.now_s,
        "ready_s": ready_s,
    }


def space_of(sites: int = SITES) -> Any:
    """Sites with a pruning ratio and a bit width each."""
    from planish.spaces.space import Choice, Kind, SearchSpace

    choices = []
    for site in range(sites):
        choices.append(Choice(f"layer{site}", Kind.PRUNE, (None, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)))
        choices.append(Choice(f"layer{site}", Kind.BITS, (None, 8, 4)))
    return SearchSpace(tuple(choices), {})


def table_of(space: Any) -> Any:
    """What a library would know of it: errors that rise, and costs that fall, with every option."""
    from planish.search.option_table import OptionTable, Site, every_level

    errors, sites = [], []
    for choice in space.choices:
        strength = np.arange(len(choice.options)) / len(choice.options)
        errors.append(0.02 * strength**2)
    for site in range(len(space.choices) // 2):
        own = (2 * site, 2 * site + 1)
        combinations = np.array(every_level([len(space.choices[place].options) for place in own]))
        prune, bits = combinations.T
        cost = (1 - prune / 8) * np.array([1.0, 0.55, 0.475])[bits] / len(space.choices) * 2e-3
        summed = errors[own[0]][prune] + errors[own[1]][bits]
        sites.append(Site(f"layer{site}", (), own, combinations, summed, {"latency[cpu]": cost}))
    return OptionTable(space, {}, {}, tuple(sites), {"latency[cpu]": 0.0}, tuple(errors), {})


def metrics_of(candidate: Any, sites: int) -> dict[str, Any]:
    """Metrics that contradict each other, from the options alone."""
    kept, bits = 1.0, 0.0
    for name, option in candidate.options.items():
        if option is not None:
            kept -= float(option) / sites if name.endswith("prune") else 0.0
            bits += (1 - float(option) / 32) / sites if name.endswith("bits") else 0.0
    latency = 1e-3 * max(0.05, kept) * (1 - 0.6 * bits)
    accuracy = 0.95 - 0.3 * (1 - kept) ** 2 - 0.1 * bits**2
    return {
        "accuracy": accuracy,
        "size_bytes": int(1_000_000 * kept * (1 - bits)),
        "latency_s": {"cpu": {"value": latency, "ci95": [latency, latency]}},
    }


def seconds_of(run: Path) -> list[float]:
    """How long the evaluations of a run took, which its journal tells: who ends first takes the next of the batch."""
    from planish.search.rundir import RunDirectory

    folder = RunDirectory.open(run)
    workers = folder.spec().workers or os.cpu_count() or 1
    batches: dict[int, list[Any]] = {}
    for record in folder.records.values():
        if record.trial.batch and record.scored_s is not None:
            batches.setdefault(record.trial.batch, []).append(record)
    found = []
    for records in batches.values():
        free = [max(record.started_s for record in records)] * workers
        for record in sorted(records, key=lambda record: record.scored_s):
            found.append(round(record.scored_s - heapq.heappop(free), 3))
            heapq.heappush(free, record.scored_s)
    return [seconds for seconds in found if seconds > 0]


def store_trace(run: Path) -> None:
    """Makes a run's evaluations those that later simulations draw from."""
    TRACE.write_text(json.dumps({"seconds": seconds_of(run)}) + "\n", encoding="utf-8")
