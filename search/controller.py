"""The search from a specification to the front: original, reach, batches, distillation rungs, finalists.

Everything that happened is in the run's journal; every phase first looks there, so a run that was killed at any point
carries on with what is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..spaces.space import Candidate
from .atomic import write_json
from .batches import Batches
from .config import Spec
from .counters import Counters
from .device_worker import DeviceWorker, offered
from .errors import UserError
from .front import improves
from .front_writer import FrontWriter
from .ledger import Ledger
from .left_alone import LEFT_ALONE, left_alone
from .library_phase import library
from .measuring import waiting_for
from .planish_sampler import SamplerTask
from .predicting import keep_times
from .progress import Progress
from .promotion import promoted
from .provenance import provenance
from .reach import check_reach, check_together
from .reachable import check_answers
from .run import Run
from .rundir import FRONT, LESSONS, RunDirectory
from .rungs import gpu_part, run_rung
from .sampler import OPENS, WITH_TABLE, Proposer, opening, strongest
from .shipping import stored
from .spec_values import check_value
from .steps import Steps
from .task_note import builtin, write_task
from .timed_on import keep_devices, vectors_of
from .trial import State
from .workers import Failure, Pool, Shared, cluster

if TYPE_CHECKING:
    from .evaluate import Evaluator, Metrics
    from .tasks import Task

# The model's name in the specification of a run that was launched from Python, with a task that has no name to load by.
PYTHON_MODEL = "python:"


def search_run(
    spec: Spec,
    out: Path,
    progress: Progress,
    command: str = "planish.search.launch",
    task: Task | None = None,
    *,
    train_only: bool = False,
) -> Run:
    """Launches a search, or carries on with it where the folder holds one of the same specification.

    With `train_only` it carries on with the distillation rungs and ends before anything is timed, whatever processor
    this machine has.

    Raises:
        UserError: the specification, the task, a device or the folder is not usable, or a budget is out of reach.
    """
    from .evaluate import Evaluator

    spec.budgets()  # before any work: a budget that cannot be read
    if task is None and spec.model.startswith(PYTHON_MODEL):
        raise UserError(
            f"the run in {out} was launched from Python; carry on with planish.search.resume({str(out)!r}, task=...)"
        )
    RunDirectory.examine(out, spec)  # also before the model is loaded, which may take a minute
    # The space is that of the device on which the run began, whose vectors may be others than this machine's.
    vectors = vectors_of(out, spec.space.lanes) if train_only else None
    evaluator = Evaluator(spec, task, vectors=vectors)
    described = [{"name": label, "title": d.title, "threads": d.threads} for label, d in evaluator.devices.items()]
    known = out.joinpath("spec.toml").exists()
    origin = provenance(spec, command, described)
    with RunDirectory.create(out, spec, origin) as folder:
        if known:
            folder.add_resumption(origin)
        search = _Search(evaluator, folder, progress, task)
        return search.train() if train_only else search.run()


def resume_run(
    path: Path,
    progress: Progress,
    workers: int | None = None,
    task: Task | None = None,
    *,
    train_only: bool = False,
) -> Run:
    """Carries on with the run in a folder; `train_only` as for `search_run`.

    Raises:
        UserError: it is not a run, another controller works on it, or its task is not to be had by name.
    """
    spec = RunDirectory.open(path).spec(needed=True)
    if workers is not None:
        spec = replace(spec, workers=int(str(check_value("workers", workers, "the command line"))))
    command = f"planish resume {path.name}" + (" --train-only" if train_only else "")
    return search_run(spec, path, progress, command, task, train_only=train_only)


class _Search:
    def __init__(self, evaluator: Evaluator, folder: RunDirectory, progress: Progress, task: Task | None) -> None:
        self.evaluator, self.folder, self.progress, self.task = evaluator, folder, progress, task
        self.spec = evaluator.spec
        self.space = evaluator.proposal.space
        self.ledger = Ledger(folder, self.spec)
        self.steps = Steps(evaluator, self.ledger, progress)
        self.front = FrontWriter(self.ledger, tuple(evaluator.devices), progress)
        self.asked: SamplerTask | None = None

    def run(self) -> Run:
        if self.spec.address == "local" and self.ledger.phase() != "done":
            self._begun_with()
        self.folder.write_space(self.space)
        self._same_task()
        if self.ledger.phase() == "done":
            return Run(self.folder.path) if (self.folder.path / FRONT).exists() else self._end()
        if self.spec.measure.latency == "predicted":
            scored = sum(record.score is not None for record in self.ledger.records.values())
            self.evaluator.predict_by(keep_times(self.evaluator, self.folder.path, scored))
        check_answers(self.evaluator.devices.values(), predicted=self.spec.measure.latency == "predicted")
        if not self.space.choices:
            raise UserError(
                "the model's space is empty: no layer has an option "
                f"({'; '.join(f'{k}: {v}' for k, v in list(self.space.left_out.items())[:3])})"
            )
        with self._session() as on_gpu:
            self.shared = self._shared()
            pool = Pool(self.shared, self.workers)
            try:
                self._original(pool)
                if len(self.ledger.records) == 1:
                    from .forecast import forecast

                    self.progress.note(forecast(self.evaluator, self.workers, on_gpu))
                corners = self._reach(pool)
                self._batches(pool, corners)
                self._rescored(pool)
            finally:
                pool.close()
            self._finalists(self._rungs())
        return self._end()

    def _same_task(self) -> None:
        """Notes what the run is about, or refuses other weights or data than it began with.

        A built-in model is trained by every user for himself, and differs in its last digits.
        """
        write_task(self.folder.path, self.evaluator.task, weights=self.task is not None or not builtin(self.spec))

    def train(self) -> Run:
        """The distillation rungs that are left, of candidates that are all scored; nothing is timed or compiled.

        Raises:
            UserError: the run is not that far, or its space is another.
        """
        self.folder.write_space(self.space)
        self._same_task()
        phase = self.ledger.phase() or "nothing"
        if phase in ("finalists", "done"):
            self.progress.note("all of it is trained; carry on where the run began with: planish resume")
            return Run(self.folder.path)
        # A session that was cut off at its beginning leaves an earlier phase behind as the last.
        if not any(begun.name.startswith("distill") for begun in self.folder.phases):
            raise UserError(
                f"the run in {self.folder.path} has come to {phase} and not to training; carry on where it began"
            )
        with self._session():
            self.shared = self._shared(timed=False)
            self._rungs()
        self.progress.note("trained; carry on where the run began with: planish resume")
        return Run(self.folder.path)

    @contextmanager
    def _session(self) -> Iterator[bool]:
        """A Ray session with its number of workers, and whether they train on a GPU.

        Raises:
            UserError: there is no cluster at the address, or a GPU is asked for that is not there.
        """
        from .training_device import gpus_here

        gpus = gpus_here(self.spec.distill.device) if self.spec.address == "local" else 0
        with cluster(self.spec.address, self.spec.workers, gpus) as self.workers:
            yield gpu_part(self.spec, 1) > 0

    def _begun_with(self) -> None:
        """The devices are as the run began with them."""
        for label, device in keep_devices(self.folder.path, self.evaluator.devices).items():
            self.evaluator.move(label, device, self.evaluator.timers[label])

    def _shared(self, *, timed: bool = True) -> Shared:
        """What the workers get; on a cluster the task goes into the object store, and a device may be a node's."""
        evaluator = self.evaluator
        if self.spec.address != "local":
            self.folder.listener = Counters(self.folder.path.name).event
        if self.spec.address != "local" and timed:
            for label, name in zip(self.spec.labels(), self.spec.device, strict=True):
                if evaluator.devices[label].here and offered(name):
                    worker = DeviceWorker(name)
                    evaluator.move(label, waiting_for(label, worker.device), worker)
            self._begun_with()
        by_name = self.task is None and self.spec.address == "local"
        return Shared(
            self.spec,
            evaluator.devices,
            None if by_name else stored(evaluator.task),
            evaluator.times,
            evaluator.vectors,
        )

    def _original(self, pool: Pool) -> None:
        """Trial 0: the original as it is, on the whole validation split, compiled and timed."""
        self._begin("original", 1, "end")
        self.ledger.start(0, self.space.original(), 0)
        if self.ledger.running([0]):
            self.steps.evaluate(pool, "finish", [0], (None,), self.folder.score, fatal=True)
            self.steps.measure([0], "artifact", fatal=True)
            self.ledger.finish(0, State.COMPLETE)
            self.progress.advance()
        self.front.write()

    def _reach(self, pool: Pool) -> int:
        """The cheapest corners of the space, trials 1 to the number returned: is the budget reachable at all?"""
        numbers = self._corners(pool, strongest(self.space))
        if self._asked_since(0):
            return sum(number > 0 and record.trial.batch == 0 for number, record in self.ledger.records.items())
        try:
            self._check_reach(numbers)
        except UserError:
            # On a device whose integers are slower than its floats, or not much faster, these may be cheaper.
            numbers = self._corners(pool, [*strongest(self.space), *strongest(self.space, quantised=False)])
            self._check_reach(numbers)
        return len(numbers)

    def _corners(self, pool: Pool, candidates: Sequence[Candidate]) -> list[int]:
        """Scores candidates as trials 1, 2, ...; their numbers."""
        corners: dict[str, Candidate] = {}
        for corner in candidates:
            # Some are the same model as another once it is built.
            corners.setdefault(self.evaluator.simplified(corner).key(), corner)
        numbers = list(range(1, 1 + len(corners)))
        self._begin("reach", len(numbers), "score")
        for number, corner in zip(numbers, corners.values(), strict=True):
            self.ledger.start(number, corner, 0)
        self.steps.score(pool, numbers)
        return numbers

    def _check_reach(self, numbers: Sequence[int]) -> None:
        ledger = self.ledger
        try:
            check_reach(
                self.spec.budgets(), ledger.bounds(), ledger.original, [ledger.metrics(n) for n in (0, *numbers)]
            )
        except UserError:
            self.front.write()
            raise

    def _task_of_sampler(self, pool: Pool) -> SamplerTask:
        """What a sampler with a table needs: the library of the space's options."""
        self._begin("library", 1, "end")
        ledger = self.ledger
        costs = dict.fromkeys(o.metric for o in (*ledger.objectives, *ledger.bounds()) if o.goal == "minimize")
        table = library(self.evaluator, self.folder.path, pool, self.workers, list(costs), self.progress)
        if not self._asked_since(1 if self.spec.sampler in OPENS else 0):
            try:
                check_together(self.spec.budgets(), ledger.bounds(), ledger.original, table)
            except UserError:
                self.front.write()
                raise
        shape = self.evaluator.traced.output_shape
        self.asked = SamplerTask(
            table=table,
            objectives=ledger.objectives,
            original=tuple(objective.value(ledger.original) for objective in ledger.objectives),
            limits=ledger.limits(),
            classes=shape[1] if len(shape) == 2 else 0,
            least_accuracy=max([0.0, *(b.bound or 0.0 for b in ledger.bounds() if b.metric == "accuracy")]),
            epochs=self.spec.distill.passes(len(self.evaluator.task.data.train)),
        )
        return self.asked

    def _asked_since(self, batch: int) -> bool:
        """Whether an earlier session asked for a later batch: what it found reachable then is not decided again.

        What it measured since would be judged by: corners that were trained and timed again.
        """
        return any(record.trial.batch > batch for record in self.ledger.records.values())

    def _batches(self, pool: Pool, corners: int) -> None:
        """Batches of proposals: scored, compiled, timed, told. Corners come on top of `search.trials`."""
        ledger, sampler = self.ledger, self.spec.sampler
        proposer = Proposer(
            self.folder.path / "study.log",
            self.space,
            sampler,
            self.spec.seed,
            ["maximize" if o.goal == "maximize" else "minimize" for o in ledger.objectives],
            self.evaluator.simplified,
            self._task_of_sampler(pool) if sampler in WITH_TABLE and sampler not in OPENS else None,
        )
        try:
            self._search(pool, proposer, corners)
        finally:
            proposer.close()

    def _search(self, pool: Pool, proposer: Proposer, corners: int) -> None:
        """Every batch; those of an earlier session are told without being asked for again."""
        keys, sampler = self.spec.search, self.spec.sampler
        proposer.replay(0, [self.ledger.told(number) for number in range(1, 1 + corners)])
        batches = Batches(self.ledger, self.steps, proposer, 1 + corners)
        self._begin("search", keys.trials, "score")
        if sampler in OPENS:
            batches.opening(pool, opening(sampler, keys.batch, keys.trials))
            proposer.inform(self._task_of_sampler(pool))
            self._begin("search", keys.trials, "score")
        batches.rest(pool)

    def _rescored(self, pool: Pool) -> None:
        """Scores on all of the validation split what may enter the first rung: twice as many as will."""
        ledger, survivors = self.ledger, self.spec.distill.survivors[0]
        alive = self._alive()
        if any(phase.name.startswith("distill") for phase in self.folder.phases) or len(alive) <= survivors:
            return
        if len(self.evaluator.task.data.validation) <= self.spec.search.proxy_images:
            return
        # By what was known before any of them, so that a resumed run takes the same.
        chosen = self._entered("rescore") or promoted(ledger, alive, 2 * survivors, 0, hopeless=self._hopeless(alive))
        self._begin("rescore", len(chosen), "rescore", -1, chosen)
        waiting = [n for n in ledger.running(chosen) if ledger.records[n].rescore is None]
        self.progress.begin("rescore", len(chosen), len(chosen) - len(waiting))

        def done(number: int, metrics: Metrics) -> None:
            self.folder.rescore(number, metrics)
            self.progress.advance()

        self.steps.evaluate(pool, "rescore", waiting, (), done)

    def _hopeless(self, numbers: Sequence[int]) -> set[int]:
        """Whom training is not expected to bring to the budget on accuracy, as far as the library tells."""
        if self.asked is None or not numbers:
            return set()
        candidates = [self.ledger.records[number].trial.candidate for number in numbers]
        return {number for number, one in zip(numbers, self.asked.hopeless(candidates), strict=True) if one}

    def _alive(self) -> list[int]:
        ledger = self.ledger
        return [n for n in sorted(ledger.records) if n and ledger.state(n) in (State.RUNNING, State.COMPLETE)]

    def _rungs(self) -> list[int]:
        """Successive halving: fewer candidates, more epochs. Returns who got through."""
        ledger, epochs, survivors = self.ledger, self.spec.distill.rungs, self.spec.distill.survivors
        from .score import guessing

        guess = guessing(self.evaluator.task.data.validation)
        alive = self._alive()
        # Of the first rung only those that were scored on the same images compete, where that was done.
        rescored = [number for number in alive if ledger.records[number].rescore is not None]
        for rung, (until, count) in enumerate(zip(epochs, survivors, strict=True)):
            name = f"distill to epoch {until}"
            # As it was decided once: a kill between two of those who are stopped leaves others to choose from.
            able = rescored if not rung and len(rescored) >= count else alive
            entering = self._entered(name) or promoted(
                ledger, able, count, rung, guess, last=0 < rung == len(epochs) - 1, hopeless=self._hopeless(able)
            )
            self._begin(name, len(entering), "rung", rung, entering)
            missing = [
                n for n in entering if rung not in ledger.records[n].rungs and ledger.state(n) is not State.FAILED
            ]
            self.progress.begin(f"distill to epoch {until}", len(entering), len(entering) - len(missing))
            for number in alive:
                if number not in entering:
                    ledger.stop(number)

            def done(number: int, result: Metrics | Failure, rung: int = rung, until: int = until) -> None:
                if isinstance(result, Failure):
                    ledger.fail(number, str(result))
                else:
                    self.folder.rung(number, rung, until, result)
                self.progress.advance()

            if missing:
                run_rung(self.shared, [ledger.job(n) for n in missing], until, epochs[-1], self.workers, done)
                # The next rung's epochs are others.
                shutil.rmtree(self.folder.path / LESSONS, ignore_errors=True)
            alive = [n for n in entering if ledger.state(n) is not State.FAILED]
        shutil.rmtree(self.folder.path / LESSONS, ignore_errors=True)
        return alive

    def _entered(self, phase: str) -> list[int]:
        """The trials that an earlier session let into a rung; none where none did."""
        found = next((p.trials for p in self.folder.phases if p.name == phase and p.trials), ())
        return [number for number in found if number in self.ledger.records]

    def _finalists(self, finalists: Sequence[int]) -> None:
        """Compiles what was trained, checks it against torch, and times it in several fresh processes."""
        numbers = self.ledger.running(finalists)
        self._begin("finalists", len(finalists), "end")
        self.progress.begin("finalists", len(finalists), len(finalists) - len(numbers))
        if numbers:
            self._finish(numbers)
        ended = [n for n in finalists if self.ledger.state(n) in (State.COMPLETE, State.INFEASIBLE)]
        self.steps.explain(ended)
        cost = next(o.metric for o in self.ledger.objectives if o.goal == "minimize")
        if self.asked is not None and cost in self.asked.table.fixed:
            for number in ended:
                reasons = left_alone(self.asked.table, self.ledger.candidate(number), cost)
                write_json(self.folder.trial_folder(number) / LEFT_ALONE, reasons)
        self.front.write()

    def _finish(self, numbers: Sequence[int]) -> None:
        self._train_again(numbers)
        numbers = self.ledger.running(numbers)
        finished: dict[int, Metrics] = {}
        pool = Pool(self.shared, self.workers)
        try:
            self.steps.evaluate(pool, "finish", numbers, (self.ledger.recipe(),), finished.__setitem__)
        finally:
            pool.close()
        latencies = self.steps.time(sorted(finished), "artifact")
        for number, metrics in finished.items():
            latency = latencies[number]
            if isinstance(latency, Failure):
                self.ledger.fail(number, str(latency))
            else:
                # What disturbed the first timing is no matter of this one.
                self._complete(number, {**metrics, "drifted": False, **latency})
            self.progress.advance()

    def _train_again(self, numbers: Sequence[int]) -> None:
        """Those whose checkpoint is lost: the same seed gives the same student, and what it was is recorded."""
        from .distill_state import epoch_of
        from .evaluate import CHECKPOINT

        epochs = self.spec.distill.rungs[-1]
        # One of an earlier epoch was written by a training that was ended, or is from before a copy: it goes on.
        lost = [n for n in numbers if epoch_of(self.folder.trial_folder(n) / CHECKPOINT) != epochs]
        if not lost:
            return
        self.progress.note(f"the checkpoints of trials {', '.join(map(str, lost))} are lost; they are trained again")

        def done(number: int, result: Metrics | Failure) -> None:
            if isinstance(result, Failure):
                self.ledger.fail(number, str(result))

        run_rung(self.shared, [self.ledger.job(n) for n in lost], epochs, epochs, self.workers, done)
        shutil.rmtree(self.folder.path / LESSONS, ignore_errors=True)

    def _complete(self, number: int, metrics: Metrics) -> None:
        """The end of a finalist: what is no improvement on the original is never offered."""
        trial = self.ledger.records[number].trial
        whole = replace(trial, state=State.COMPLETE, metrics={**trial.metrics, **metrics}, error=None)
        if improves(self.ledger.objectives, whole, self.ledger.original):
            self.ledger.finish(number, State.COMPLETE, None, metrics)
        else:
            timed = any(o.metric.startswith("latency[") for o in self.ledger.objectives)
            reason = "it is not faster than the original on any device" if timed else "it is cheaper in nothing"
            self.ledger.finish(number, State.INFEASIBLE, reason, metrics)

    def _end(self) -> Run:
        """Reads the test split, once, for what is on the front; removes what only the search needed."""
        numbers = {0, *self.front.write()}
        self.front.write({n: self.evaluator.test(self.ledger.job(n), trained=n != 0) for n in sorted(numbers)})
        for number in self.ledger.records:
            for leftover in self.folder.path.glob(f"trials/{number:04d}/untrained*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._begin("done", 1, "end")
        from .report import write_report

        write_report(self.folder.path)
        return Run(self.folder.path)

    def _begin(self, name: str, total: int, unit: str, rung: int | None = None, trials: Sequence[int] = ()) -> None:
        if self.ledger.phase() != name:
            self.folder.phase(name, total, unit, trials)
        if rung is None and name not in ("finalists", "done"):
            scored = sum(1 for n, r in self.ledger.records.items() if n and r.trial.batch and r.score is not None)
            self.progress.begin(name, total, scored if name == "search" else 0)
