"""What a run knows of its trials: read from the journal, and recorded there before anything else."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..spaces.space import Candidate
from .config import Spec
from .errors import UserError
from .objective import Objective
from .planish_sampler import COST, DIVERGENCE
from .replay import Record
from .rundir import RunDirectory
from .trial import State, Trial

if TYPE_CHECKING:
    from .evaluate import Job, Metrics

# A candidate, its objectives in order or None if it failed, and what else is known of it (`Proposer.tell`).
Told = tuple[Candidate, Sequence[float] | None, Mapping[str, float]]
# Bytes that compiling and checking one model may need; a compiler that runs out of them says so in a hundred ways.
_ROOM = 8 * 2**20


class Ledger:
    """The trials of a run that this process may carry on, by number."""

    def __init__(self, folder: RunDirectory, spec: Spec) -> None:
        """`folder` is locked by this process; `spec` is what the run searches."""
        self.folder, self.spec = folder, spec
        self.objectives = spec.targets()

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def records(self) -> Mapping[int, Record]:
        """Every trial that has started."""
        return self.folder.records

    def phase(self) -> str | None:
        """The phase that began last."""
        phases = self.folder.phases
        return phases[-1].name if phases else None

    def state(self, number: int) -> State:
        """Whether a trial runs, or how it ended."""
        return self.records[number].trial.state

    def running(self, numbers: Sequence[int]) -> list[int]:
        """Those of the trials that have not ended."""
        return [number for number in numbers if self.state(number) is State.RUNNING]

    def candidate(self, number: int) -> Candidate:
        """What a trial is."""
        return self.records[number].trial.candidate

    def metrics(self, number: int) -> Mapping[str, object]:
        """What is known of a trial by now."""
        return self.records[number].trial.metrics

    @property
    def original(self) -> Mapping[str, object]:
        """The metrics of the original, trial 0."""
        return self.metrics(0)

    def original_s(self) -> dict[str, float] | None:
        """The original's latency by device; None before it was measured."""
        known = self.original.get("latency_s") if 0 in self.records else None
        return {label: float(entry["value"]) for label, entry in known.items()} if isinstance(known, Mapping) else None

    def energy_measured(self) -> bool | None:
        """Whether the original's energy was measured, not modelled; None before it was timed."""
        return None if self.original_s() is None else self.original.get("energy_measured") is True

    def bounds(self) -> list[Objective]:
        """The budgets in absolute numbers."""
        return [budget.resolve(self.original) for budget in self.spec.budgets()]

    def values(self, number: int) -> list[float] | None:
        """A trial's objectives in their order; None if it failed."""
        if self.state(number) is State.FAILED:
            return None
        return [objective.value(self.metrics(number)) for objective in self.objectives]

    def limits(self) -> dict[str, float]:
        """The most of every cost that has a budget, relative to the original; of several budgets the tightest."""
        found: dict[str, float] = {}
        for bound in self.bounds():
            value = bound.value(self.original)
            if bound.goal == "minimize" and bound.bound is not None and value > 0:
                found[bound.metric] = min(found.get(bound.metric, math.inf), bound.bound / value)
        return found

    def told(self, number: int) -> Told:
        """What a proposer is told of a trial: the divergence from the original, and costs that only have a budget."""
        attributes = {}
        divergence = (self.records[number].score or {}).get("divergence")
        if isinstance(divergence, (int, float)):
            attributes[DIVERGENCE] = float(divergence)
        traded = {objective.metric for objective in self.objectives}
        for bound in self.bounds():
            ratio = bound.ratio(self.metrics(number), self.original)
            if bound.goal == "minimize" and bound.metric not in traded and math.isfinite(ratio):
                attributes[COST + bound.metric] = ratio
        return self.candidate(number), self.values(number), attributes

    def job(self, number: int) -> Job:
        """What a worker needs to evaluate a trial."""
        from .evaluate import Job

        trial = self.records[number].trial
        return Job(number, trial.candidate, trial.seed, self.folder.trial_folder(number).resolve())

    def recipe(self) -> Metrics:
        """How the trials that reach the end are trained."""
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

    # -- what is recorded ---------------------------------------------------------------------------------------------

    def start(self, number: int, candidate: Candidate, batch: int) -> None:
        """A trial begins, unless it has."""
        if number not in self.records:
            self.begin({number: candidate}, batch)

    def begin(self, candidates: Mapping[int, Candidate], batch: int) -> None:
        """The trials of a batch begin, unless they have, all in one write."""
        new = {number: candidate for number, candidate in candidates.items() if number not in self.records}
        self.folder.start(
            [Trial(n, candidate, State.RUNNING, {}, None, self._seed(n), batch) for n, candidate in new.items()]
        )

    def finish(self, number: int, state: State, error: str | None = None, metrics: Metrics | None = None) -> None:
        """A trial ends; a second end changes nothing."""
        trial = self.records[number].trial
        merged = dict(metrics or {})
        if state is State.COMPLETE:
            merged = {"measured": self.spec.measure.latency == "measured", **merged}
        self.folder.append(Trial(number, trial.candidate, state, merged, error, trial.seed, trial.batch))

    def fail(self, number: int, reason: str) -> None:
        """A trial has no result.

        Raises:
            UserError: a disk is full, which is no fault of the trial's: it is not recorded, and will be tried again.
        """
        for place in (self.folder.path, Path(tempfile.gettempdir())):
            free = shutil.disk_usage(place).free
            if free < _ROOM:
                raise UserError(
                    f"the disk of {place} is full ({free // 1024} KB left), so trial {number} failed: {reason}; what "
                    f"was recorded is kept; once there is room, carry on with: planish resume {self.folder.path}"
                )
        self.finish(number, State.FAILED, reason)

    def stop(self, number: int) -> None:
        """A trial is not carried on."""
        if self.state(number) is State.RUNNING:
            self.finish(number, State.STOPPED)

    def _seed(self, number: int) -> int:
        digest = hashlib.sha256(f"trial:{self.spec.seed}:{number}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1
