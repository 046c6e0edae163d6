"""The steps of a trial, recorded as they are done: scored, timed, trained to the end, explained. None is done twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compilers.compiler import RunError
from ..hwmodels.measurement import MeasureProtocol
from .atomic import write_json
from .errors import UserError
from .ledger import Ledger
from .measuring import measure_trials, waiting_for
from .progress import Progress
from .slow_sites import slow_sites
from .trial import State
from .workers import Failure, Pool

if TYPE_CHECKING:
    from .evaluate import Evaluator, Job, Metrics

SLOW_SITES = "slow_sites.json"
_log = logging.getLogger(__name__)


class Steps:
    """The steps of a run's trials. Nothing is evaluated while something is timed."""

    def __init__(self, evaluator: Evaluator, ledger: Ledger, progress: Progress) -> None:
        """Evaluations happen in the pools that are passed, timing in child processes of this one."""
        self._evaluator, self._ledger, self._progress = evaluator, ledger, progress
        self._spec, self._folder = ledger.spec, ledger.folder

    def score(self, pool: Pool, numbers: Sequence[int]) -> None:
        """Scores and times the trials that have not been; a trial that fails ends."""
        ledger = self._ledger
        scoring = self.unscored(numbers)
        self._progress.advance(0)

        def done(number: int, metrics: Metrics) -> None:
            self._folder.score(number, metrics)
            self._progress.advance()

        self.evaluate(pool, "score", scoring, (), done)
        self.measure([n for n in ledger.running(numbers) if not self._timed(n)], "untrained")

    def catch_up(self, numbers: Sequence[int]) -> None:
        """Times those of the trials that have a score and no time: a kill came between the two."""
        known = self._ledger.records
        self.measure([n for n in self._ledger.running(numbers) if known[n].score and not self._timed(n)], "untrained")

    def unscored(self, numbers: Sequence[int]) -> list[int]:
        """Those of the trials that run and have no score."""
        return [n for n in self._ledger.running(numbers) if self._ledger.records[n].score is None]

    def stream(self, pool: Pool, more: Callable[[], int | None]) -> None:
        """Scores the trials that `more` gives, until it gives None and none is left; latency must be predicted."""

        def next_job() -> tuple[Job, tuple[Any, ...]] | None:
            number = more()
            return None if number is None else (self._ledger.job(number), ())

        def done(job: Job, result: Metrics | Failure) -> None:
            if isinstance(result, Failure):
                self._ledger.fail(job.number, str(result))
            else:
                self._folder.score(job.number, result)
                self.measure([job.number], "untrained")
            self._progress.advance()

        pool.stream("score", next_job, done)

    def settled(self, numbers: Sequence[int]) -> bool:
        """Whether all of the trials are scored and timed, or have failed."""
        records = self._ledger.records
        return all(
            records[n].trial.state is State.FAILED or (records[n].score is not None and self._timed(n)) for n in numbers
        )

    def evaluate(
        self,
        pool: Pool,
        method: str,
        numbers: Sequence[int],
        arguments: tuple[Any, ...],
        done: Callable[[int, Metrics], None],
        fatal: bool = False,
    ) -> None:
        """Calls a method of the workers' evaluators for every trial; one that fails ends.

        Args:
            pool: Of workers.
            method: `score` or `finish`.
            numbers: The trials.
            arguments: After the job.
            done: Called with a trial's number and metrics as each one ends.
            fatal: What fails ends the run (it is the original) and not only the trial.

        Raises:
            UserError: the original failed.
        """

        def ended(job: Job, result: Metrics | Failure) -> None:
            if isinstance(result, Failure):
                if fatal:
                    raise UserError(f"the original model cannot be evaluated: {result}")
                self._ledger.fail(job.number, str(result))
                self._progress.advance()
            else:
                done(job.number, result)

        pool.run(method, [(self._ledger.job(n), arguments) for n in numbers], ended)

    def measure(self, numbers: Sequence[int], name: str, fatal: bool = False) -> None:
        """Times the artifacts of that name beside the original and records it; UserError if the original fails."""
        for number, result in self.time(numbers, name).items():
            if isinstance(result, Failure):
                if fatal:
                    raise UserError(f"the original model cannot be measured: {result}")
                self._ledger.fail(number, str(result))
            else:
                for label in self._evaluator.devices:
                    self._folder.measure(number, label, _of_device(result, label))

    def time(self, numbers: Sequence[int], name: str) -> dict[int, Metrics | Failure]:
        """Times the artifacts of that name beside the original; the caller records it.

        Where latency is predicted, it is what the trials' scores hold, relative to the original's.
        """
        if self._predicted:
            return {number: self._prediction(number) for number in numbers}
        return measure_trials(
            self._evaluator,
            {n: self._folder.trial_folder(n) for n in numbers},
            self._folder.trial_folder(0),
            name,
            final=name == "artifact",
            original_s=self._ledger.original_s(),
            energy_measured=self._ledger.energy_measured(),
        )

    def explain(self, numbers: Sequence[int]) -> None:
        """Writes `slow_sites.json` of every trial: which compressed sites did not get faster, and why.

        One whose kernels cannot be told from each other stays without.
        """
        numbers = [n for n in numbers if not (self._folder.trial_folder(n) / SLOW_SITES).exists()]
        if not numbers:
            return
        label, device = next(iter(self._evaluator.devices.items()))
        # From here the kernels of a device behind RPC cannot be told from each other.
        if self._predicted or device.rpc:
            predictor = self._evaluator.predictor
            base = predictor.calls(self._evaluator.proposal.space.original(), label)
            for number in numbers:
                candidate = self._ledger.candidate(number)
                reasons = slow_sites(candidate, predictor.calls(candidate, label), base)
                write_json(self._folder.trial_folder(number) / SLOW_SITES, reasons)
            return
        protocol = MeasureProtocol(time_limit_s=self._spec.measure.time_limit_s)
        folders = {
            str(n): self._evaluator.artifact_folder(self._folder.trial_folder(n), label, "artifact")
            for n in (0, *numbers)
        }
        calls = self._site_times(label, folders, protocol)
        for number in (n for n in numbers if str(n) in calls and "0" in calls):
            reasons = slow_sites(self._ledger.candidate(number), calls[str(number)], calls["0"])
            write_json(self._folder.trial_folder(number) / SLOW_SITES, reasons)

    def _site_times(
        self, label: str, folders: Mapping[str, Path], protocol: MeasureProtocol
    ) -> dict[str, list[tuple[str, str, float]]]:
        """By artifact; of several that end their process together, those that do not alone."""
        timer = self._evaluator.timers[label]
        try:
            return dict(waiting_for(label, lambda: timer.site_times(folders, protocol)))
        except RunError as error:
            if len(folders) > 1:
                return {k: v for n, f in folders.items() for k, v in self._site_times(label, {n: f}, protocol).items()}
            _log.warning("the kernels of trial %s cannot be timed one by one: %s", next(iter(folders)), error)
            return {}

    @property
    def _predicted(self) -> bool:
        return self._spec.measure.latency == "predicted"

    def _prediction(self, number: int) -> Metrics:
        latency = (self._ledger.records[number].score or {}).get("latency_s")
        known = latency if isinstance(latency, Mapping) else {}
        original = self._ledger.original_s() or {}
        return {
            "latency_s": dict(known),
            "latency_ratio": {label: entry["value"] / original[label] for label, entry in known.items()},
        }

    def _timed(self, number: int) -> bool:
        return set(self._ledger.records[number].measures) >= set(self._evaluator.devices)


def _of_device(metrics: Mapping[str, object], label: str) -> dict[str, object]:
    """What was measured on one device."""
    return {
        name: {label: value[label]} if isinstance(value, Mapping) and label in value else value
        for name, value in metrics.items()
    }
