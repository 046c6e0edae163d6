"""The search from a specification to the front: original, reach, batches, distillation rungs, finalists.

Everything that happened is in the run's journal; every phase first looks there, so a run that was killed at any point
carries on with what is missing. Nothing is evaluated while something is timed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compilers.runner import site_times
from ..hwmodels.measurement import MeasureProtocol
from ..spaces.space import Candidate
from .atomic import write_json
from .config import Spec
from .errors import UserError
from .front import Entry, front_document, improves
from .measuring import measure_trials
from .objective import Objective
from .progress import Progress
from .provenance import provenance
from .reach import check_reach
from .replay import Record
from .run import Run
from .rundir import RunDirectory
from .rungs import promote, run_rung
from .sampler import Proposer, strongest
from .slow_sites import slow_sites
from .task_note import write_task
from .trial import State, Trial
from .workers import Failure, Pool, cluster

if TYPE_CHECKING:
    from .evaluate import Evaluator, Job, Metrics
    from .tasks import Task


def search_run(
    spec: Spec, out: Path, progress: Progress, command: str = "planish.search.launch", task: Task | None = None
) -> Run:
    """Launches a search, or carries on with it where the folder holds one of the same specification.

    Raises:
        UserError: the specification, the task, a device or the folder is not usable, or a budget is out of reach.
    """
    from .evaluate import Evaluator, missing_metrics

    lacking = missing_metrics(spec.objectives)
    if lacking:
        raise UserError(f"objective {lacking!r} has no model yet; allowed are accuracy, latency, size, memory, macs")
    spec.budgets()  # before any work: a budget that cannot be read
    if task is None and spec.model.startswith(PYTHON_MODEL):
        raise UserError(
            f"the run in {out} was launched from Python; carry on with planish.search.resume({str(out)!r}, task=...)"
        )
    RunDirectory.examine(out, spec)  # also before the model is loaded, which may take a minute
    evaluator = Evaluator(spec, task)
    described = [{"name": label, "title": d.title, "threads": d.threads} for label, d in evaluator.devices.items()]
    known = out.joinpath("spec.toml").exists()
    origin = provenance(spec, command, described)
    with RunDirectory.create(out, spec, origin) as folder:
        if known:
            folder.add_resumption(origin)
        return _Search(evaluator, folder, progress, task).run()


def resume_run(path: Path, progress: Progress, workers: int | None = None, task: Task | None = None) -> Run:
    """Carries on with the run in a folder.

    Raises:
        UserError: it is not a run, another controller works on it, or its task is not to be had by name.
    """
    from dataclasses import replace

    spec = RunDirectory.open(path).spec()
    if workers is not None:
        spec = replace(spec, workers=workers)
    return search_run(spec, path, progress, f"planish resume {path.name}", task)


_SLOW_SITES = "slow_sites.json"
# The model's name in the specification of a run that was launched from Python, with a task that has no name to load by.
PYTHON_MODEL = "python:"


class _Search:
    def __init__(self, evaluator: Evaluator, folder: RunDirectory, progress: Progress, task: Task | None) -> None:
        self.evaluator, self.folder, self.progress, self.task = evaluator, folder, progress, task
        self.spec = evaluator.spec
        self.space = evaluator.proposal.space
        self.objectives = self.spec.targets()
        self.records: dict[int, Record] = {}

    def run(self) -> Run:
        self.folder.write_space(self.space)
        write_task(self.folder.path, self.evaluator.task)
        self._reload()
        if self._finished():
            return Run(self.folder.path)
        if not self.space.choices:
            raise UserError(
                "the model's space is empty: no layer has an option "
                f"({'; '.join(f'{k}: {v}' for k, v in list(self.space.left_out.items())[:3])})"
            )
        with cluster(self.spec.address, self.spec.workers) as self.workers:
            pool = Pool(self.spec, self.workers, self.task)
            try:
                self._original(pool)
                self._reach(pool)
                self._batches(pool)
            finally:
                pool.close()
            self._rungs()
            self._finalists()
        return self._end()

    # -- phases -------------------------------------------------------------------------------------------------------

    def _original(self, pool: Pool) -> None:
        """Trial 0: the original as it is, on the whole validation split, compiled and timed."""
        self._begin("original", 1, "end")
        self._start(0, self.space.original(), 0)
        if self._state(0) is State.RUNNING:
            self._evaluate(pool, "finish", [0], (None,), self._whole_score, fatal=True)
            self._measure([0], "artifact", fatal=True)
            self._finish(0, State.COMPLETE)
            self.progress.advance()
        self._write_front()

    def _whole_score(self, number: int, metrics: Metrics) -> None:
        self.folder.score(number, metrics)

    def _reach(self, pool: Pool) -> None:
        """The cheapest corners of the space: is the budget reachable at all?"""
        corners = self._corners()
        numbers = list(range(1, 1 + len(corners)))
        self._begin("reach", len(numbers), "score")
        for number, corner in zip(numbers, corners, strict=True):
            self._start(number, corner, 0)
        self._score(pool, numbers)
        self.first = 1 + len(numbers)
        bounds = self._bounds()
        try:
            check_reach(self.spec.budgets(), bounds, self._base(), [self._metrics(n) for n in (0, *numbers)])
        except UserError:
            self._write_front()
            raise

    def _corners(self) -> list[Candidate]:
        """The cheapest corners, without those that are the same model as another once it is built."""
        found: dict[str, Candidate] = {}
        for corner in strongest(self.space):
            found.setdefault(self.evaluator.simplified(corner).key(), corner)
        return list(found.values())

    def _batches(self, pool: Pool) -> None:
        """Batches of proposals: scored, compiled, timed, told."""
        # Beyond the scored candidates, so that `search.trials` is what the sampler is given.
        total, size = self.spec.search.trials, self.spec.search.batch
        proposer = Proposer(
            self.folder.path / "study.log",
            self.space,
            self.spec.sampler,
            self.spec.seed,
            ["maximize" if o.goal == "maximize" else "minimize" for o in self.objectives],
            self.evaluator.simplified,
        )
        corners = [self.records[number].trial.candidate for number in range(1, self.first)]
        for number, candidate in enumerate(proposer.ask(0, len(corners), corners), start=1):
            proposer.tell(candidate, self._values(number))
        self._begin("search", total, "score")
        for batch in range(1, 1 + math.ceil(total / size)):
            first = self.first + (batch - 1) * size
            count = min(size, self.first + total - first)
            known = [self.records[n].trial.candidate for n in range(first, first + count) if n in self.records]
            candidates = proposer.ask(batch, count, known)
            numbers = list(range(first, first + len(candidates)))
            for number, candidate in zip(numbers, candidates, strict=True):
                self._start(number, candidate, batch)
            self._score(pool, numbers)
            for number in numbers:
                proposer.tell(self.records[number].trial.candidate, self._values(number))
            self._show_best()
            if len(candidates) < count:
                break  # the whole space is evaluated

    def _rungs(self) -> None:
        """Successive halving: fewer candidates, more epochs."""
        epochs, survivors = self.spec.distill.rungs, self.spec.distill.survivors
        alive = [n for n in sorted(self.records) if n and self._state(n) in (State.RUNNING, State.COMPLETE)]
        for rung, (until, count) in enumerate(zip(epochs, survivors, strict=True)):
            entering = self._promoted(alive, count, rung)
            self._begin(f"distill to epoch {until}", len(entering), "rung", rung)
            missing = [n for n in entering if rung not in self.records[n].rungs]
            self.progress.begin(f"distill to epoch {until}", len(entering), len(entering) - len(missing))
            for number in alive:
                if number not in entering:
                    self._stop(number)

            def done(number: int, result: Metrics | Failure, rung: int = rung, until: int = until) -> None:
                if isinstance(result, Failure):
                    self._finish(number, State.FAILED, str(result))
                else:
                    self.folder.rung(number, rung, until, result)
                self.progress.advance()

            if missing:
                run_rung(self.spec, [self._job(n) for n in missing], until, epochs[-1], self.workers, self.task, done)
            self._reload()
            alive = [n for n in entering if self._state(n) is not State.FAILED]
        self.finalists = alive

    def _finalists(self) -> None:
        """Compiles what was trained, checks it against torch, and times it in several fresh processes."""
        numbers = [n for n in self.finalists if self._state(n) is State.RUNNING]
        self._begin("finalists", len(self.finalists), "end")
        self.progress.begin("finalists", len(self.finalists), len(self.finalists) - len(numbers))
        if not numbers:
            return
        pool = Pool(self.spec, self.workers, self.task)
        try:
            finished: dict[int, Metrics] = {}

            def done(number: int, metrics: Metrics) -> None:
                finished[number] = metrics

            self._evaluate(pool, "finish", numbers, (self._recipe(),), done)
        finally:
            pool.close()
        latencies = self._time(list(finished), "artifact")
        self._explain([n for n, result in latencies.items() if not isinstance(result, Failure)])
        for number in finished:
            result = latencies[number]
            if isinstance(result, Failure):
                self._finish(number, State.FAILED, str(result))
            else:
                metrics = {**finished[number], **result, "measured": True}
                whole = improves(self.objectives, self._as_complete(number, metrics), self._base())
                self._finish(number, State.COMPLETE if whole else State.INFEASIBLE, self._why(metrics, whole), metrics)
            self.progress.advance()
        self._write_front()

    def _end(self) -> Run:
        """Reads the test split, once, for what is on the front; removes what only the search needed."""
        self._reload()
        front = self._write_front()
        tested: dict[int, Metrics] = {}
        for entry in [0, *(int(str(e["trial"])) for e in _entries(front))]:
            if entry not in tested:
                tested[entry] = self.evaluator.test(self._job(entry), trained=entry != 0)
        self._write_front(tested)
        for number in self.records:
            for leftover in self.folder.path.glob(f"trials/{number:04d}/untrained*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._begin("done", 1, "end")
        from .report import write_report

        write_report(self.folder.path)
        return Run(self.folder.path)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _score(self, pool: Pool, numbers: Sequence[int]) -> None:
        """Scores and times the trials that have not been; a trial that fails ends."""
        scoring = [n for n in numbers if self._state(n) is State.RUNNING and self.records[n].score is None]
        self.progress.advance(0)

        def done(number: int, metrics: Metrics) -> None:
            self.folder.score(number, metrics)
            self.progress.advance()

        self._evaluate(pool, "score", scoring, (), done)
        self._measure([n for n in numbers if self._state(n) is State.RUNNING and not self._timed(n)], "untrained")

    def _evaluate(
        self,
        pool: Pool,
        method: str,
        numbers: Sequence[int],
        arguments: tuple[Any, ...],
        done: Any,
        fatal: bool = False,
    ) -> None:
        def ended(job: Job, result: Metrics | Failure) -> None:
            if isinstance(result, Failure):
                if fatal:
                    raise UserError(f"the original model cannot be evaluated: {result}")
                self._finish(job.number, State.FAILED, str(result))
                self.progress.advance()
            else:
                done(job.number, result)

        pool.run(method, [(self._job(n), arguments) for n in numbers], ended)
        self._reload()

    def _measure(self, numbers: Sequence[int], name: str, fatal: bool = False) -> None:
        """Times trials beside the original and records it."""
        # An artifact is missing where the folder was moved without it or a cleaner took it: make it again.
        for number, result in self._time(numbers, name).items():
            if isinstance(result, Failure):
                if fatal:
                    raise UserError(f"the original model cannot be measured: {result}")
                self._finish(number, State.FAILED, str(result))
            else:
                for label in self.evaluator.devices:
                    self.folder.measure(number, label, _of_device(result, label))
        self._reload()

    def _time(self, numbers: Sequence[int], name: str) -> dict[int, Metrics | Failure]:
        return measure_trials(
            self.evaluator,
            {n: self.folder.trial_folder(n) for n in numbers},
            self.folder.trial_folder(0),
            name,
            final=name == "artifact",
            original_s=self._original_s(),
        )

    def _original_s(self) -> dict[str, float] | None:
        known = self._base().get("latency_s") if 0 in self.records else None
        return {label: float(entry["value"]) for label, entry in known.items()} if isinstance(known, Mapping) else None

    def _explain(self, numbers: Sequence[int]) -> None:
        """Writes `slow_sites.json` of every trial: which compressed sites did not get faster, and why."""
        label, device = next(iter(self.evaluator.devices.items()))
        protocol = MeasureProtocol(time_limit_s=self.spec.measure.time_limit_s)

        folders = {
            str(n): self.evaluator.artifact_folder(self.folder.trial_folder(n), label, "artifact")
            for n in (0, *numbers)
        }
        calls = site_times(folders, device, protocol)
        for number in numbers:
            reasons = slow_sites(self.records[number].trial.candidate, calls[str(number)], calls["0"])
            write_json(self.folder.trial_folder(number) / _SLOW_SITES, reasons)

    # -- what is known ------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        self.records = dict(self.folder.history().records)

    def _finished(self) -> bool:
        phases = self.folder.history().phases
        return bool(phases) and phases[-1].name == "done"

    def _begin(self, name: str, total: int, unit: str, rung: int | None = None) -> None:
        history = self.folder.history()
        last = history.phases[-1] if history.phases else None
        if last is None or last.name != name:
            self.folder.phase(name, total, unit)
        if rung is None and name not in ("finalists", "done"):
            done = sum(1 for n, r in history.records.items() if n and r.trial.batch and r.score is not None)
            self.progress.begin(name, total, done if name == "search" else 0)

    def _start(self, number: int, candidate: Candidate, batch: int) -> None:
        if number not in self.records:
            self.folder.append(Trial(number, candidate, State.RUNNING, {}, None, self._seed(number), batch))
            self._reload()

    def _finish(self, number: int, state: State, error: str | None = None, metrics: Metrics | None = None) -> None:
        trial = self.records[number].trial
        merged = {"measured": True, **(metrics or {})} if state is State.COMPLETE else dict(metrics or {})
        self.folder.append(Trial(number, trial.candidate, state, merged, error, trial.seed, trial.batch))
        self._reload()

    def _stop(self, number: int) -> None:
        if self._state(number) is State.RUNNING:
            self._finish(number, State.STOPPED)

    def _state(self, number: int) -> State:
        return self.records[number].trial.state

    def _timed(self, number: int) -> bool:
        return set(self.records[number].measures) >= set(self.evaluator.devices)

    def _metrics(self, number: int) -> Mapping[str, object]:
        return self.records[number].trial.metrics

    def _base(self) -> Mapping[str, object]:
        return self._metrics(0)

    def _bounds(self) -> list[Objective]:
        return [budget.resolve(self._base()) for budget in self.spec.budgets()]

    def _values(self, number: int) -> list[float] | None:
        if self._state(number) is State.FAILED:
            return None
        return [objective.value(self._metrics(number)) for objective in self.objectives]

    def _job(self, number: int) -> Job:
        from .evaluate import Job

        trial = self.records[number].trial
        return Job(number, trial.candidate, trial.seed, self.folder.trial_folder(number).resolve())

    def _seed(self, number: int) -> int:
        digest = hashlib.sha256(f"trial:{self.spec.seed}:{number}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def _recipe(self) -> Metrics:
        keys = self.spec.distill
        return {
            "epochs": keys.rungs[-1],
            "teacher": self.spec.model,
            "seed": self.spec.seed,
            "learning_rate": keys.learning_rate,
            "temperature": keys.temperature,
            "alpha": keys.alpha,
            "attention": keys.attention,
            "batch_size": keys.batch_size,
        }

    def _promoted(self, alive: Sequence[int], count: int, rung: int) -> list[int]:
        """Who enters a rung; those who keep the budgets on cost go before those who do not.

        A pure function of what was recorded before the rung, so that a resumed run promotes the same.
        """
        base = self._base()
        rows = [self.records[number].before(rung) for number in alive]
        losses = np.array([[o.loss(o.value(row)) for o in self.objectives] for row in rows])
        losses = losses.reshape(len(alive), len(self.objectives))
        costs = [o for o in self.objectives if o.goal == "minimize"]
        cost = np.array([max((o.ratio(row, base) for o in costs), default=0.0) for row in rows])
        bounds = [b for b in self._bounds() if b.goal == "minimize"]
        keeping = np.array([all(b.allows(b.value(row)) for b in bounds) for row in rows], dtype=bool)
        # What is not faster than the original can never be offered: it does not take a place.
        losses[np.array([c >= 1 for c in cost], dtype=bool)] = np.nan
        first = promote(np.where(keeping[:, None], losses, np.nan), cost, count) if len(alive) else []
        rest = promote(np.where(keeping[:, None], np.nan, losses), cost, count - len(first)) if len(alive) else []
        return sorted(alive[row] for row in {*first, *rest})

    def _as_complete(self, number: int, metrics: Mapping[str, object]) -> Trial:
        trial = self.records[number].trial
        return Trial(number, trial.candidate, State.COMPLETE, {**trial.metrics, **metrics}, None, trial.seed)

    def _why(self, metrics: Mapping[str, object], improved: bool) -> str | None:
        return None if improved else "it is not faster than the original on every device"

    # -- front --------------------------------------------------------------------------------------------------------

    def _write_front(self, tested: Mapping[int, Metrics] | None = None) -> dict[str, object]:
        entries = [self._entry(n, tested) for n in sorted(self.records) if self._state(n) is State.COMPLETE]
        front = front_document(self.objectives, self._bounds(), entries[0], entries[1:])
        self.folder.write_front(front)
        self._show_best(front)
        return front

    def _entry(self, number: int, tested: Mapping[int, Metrics] | None) -> Entry:
        trial = self.records[number].trial
        extra = (tested or {}).get(number, {})
        whole = Trial(
            number, trial.candidate, trial.state, {**trial.metrics, **extra}, trial.error, trial.seed, trial.batch
        )
        artifact = f"trials/{number:04d}/artifact" if len(self.evaluator.devices) == 1 else f"trials/{number:04d}"
        recipe = {**self._recipe(), "seed": trial.seed} if number else None
        reasons = self.folder.trial_folder(number) / _SLOW_SITES
        slow = json.loads(reasons.read_text(encoding="utf-8")) if reasons.exists() else None
        return Entry(whole, measured=True, recipe=recipe, artifact=artifact, slow_sites=slow)

    def _show_best(self, front: Mapping[str, object] | None = None) -> None:
        from .front import choose

        if front is None:
            return
        try:
            best = choose(front, ())
        except UserError:
            return
        metrics = best["metrics"]
        assert isinstance(metrics, Mapping)
        ratio = metrics.get("latency_ratio")
        speeds = [f"{float(r):.2f}x" for r in ratio.values()] if isinstance(ratio, Mapping) else []
        self.progress.best(f"{100 * float(metrics['accuracy']):.1f} %{' at ' if speeds else ''}{', '.join(speeds)}")


def _entries(front: Mapping[str, object]) -> list[Mapping[str, object]]:
    listed = front["front"]
    assert isinstance(listed, list)
    return listed


def _of_device(metrics: Mapping[str, object], label: str) -> dict[str, object]:
    """What was measured on one device."""
    return {
        name: {label: value[label]} if isinstance(value, Mapping) and label in value else value
        for name, value in metrics.items()
    }
