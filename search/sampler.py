"""What is evaluated next: samplers by name on an Optuna study, asked in batches of a fixed size.

A batch is a function of the run's seed, the batch's number and what was told before it, so the same search gives the
same candidates with any number of workers, and after any kill: a study is rebuilt from the journal by asking again.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spaces.space import Candidate, Choice, Kind, SearchSpace
from .errors import UserError, nearest
from .netadapt import next_of_walk
from .planish_sampler import SamplerTask, planish_sampler
from .refine import program_candidates
from .study_log import StudyLog
from .study_space import add_finished, distributions_of

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("planish", "grid", "random", "nsga2", "nsga3", "tpe", "gp", "dp", "netadapt")
# Those that begin with a table of options.
WITH_TABLE = ("planish", "dp", "netadapt")
# Those that can propose without it, so that something is known before the table is made: uniform policies, of which
# the share of all trials is small enough not to be missed among what is chosen with more knowledge.
OPENS = ("planish",)
# Those that leave marks on the trials they ask for, so that a resumed search must ask for them again.
_STATEFUL = ("nsga2", "nsga3")
_OPENING_SHARE = 8
# NSGA's own default of 50 would make a short search all first generation, which is random.
_POPULATION = 8
# Uniform candidates before the evolutionary samplers' own.
POLICIES = 24
# How often a sampler may repeat itself before a random candidate is taken, and how often that may be an old one
# before the space counts as exhausted.
_REPETITIONS = 20
_TRIES = 300


class Proposer:
    """Asks an Optuna study for candidates that were not proposed before."""

    def __init__(
        self,
        path: Path,
        space: SearchSpace,
        sampler: str,
        seed: int,
        directions: Sequence[str],
        simplified: Callable[[Candidate], Candidate] = lambda candidate: candidate,
        task: SamplerTask | None = None,
    ) -> None:
        """Starts a study in memory, which `path` (`study.log`) follows.

        Args:
            path: Optuna's journal of what was told.
            space: What may be proposed.
            sampler: One of `SAMPLERS`.
            seed: Of the run.
            directions: `minimize` or `maximize` for every value that will be told.
            simplified: The candidate without options that change nothing: two that give the same model count as one.
            task: What those of `WITH_TABLE` need; those of `OPENS` may be given it later, by `inform`.
        """
        import optuna
        from optuna.storages import InMemoryStorage
        from optuna.study import StudyDirection

        if sampler not in SAMPLERS:
            raise UserError(f"sampler {sampler!r} is not known; {nearest(sampler, SAMPLERS)}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._sampler, self._seed = space, sampler, seed
        if sampler in WITH_TABLE and sampler not in OPENS and task is None:
            raise ValueError(f"sampler {sampler!r} needs a table of options")
        self._task: SamplerTask | None = None
        self._planish: optuna.samplers.BaseSampler | None = None
        self._policies = uniform_policies(space)
        if task is not None:
            self.inform(task)
        self._accuracy: dict[tuple[int, ...], float | None] = {}
        self._asked: dict[str, optuna.trial.Trial | None] = {}
        self._candidates: list[Candidate] = []
        self._simplified = simplified
        self._keys: dict[str, str] = {}
        # The levels by which every model was first asked for.
        self._rows = {self._model(space.original()): (0,) * len(space.choices)}
        self._log = StudyLog(path, space, directions)
        self._storage, self._distributions = InMemoryStorage(), distributions_of(space)
        self._study = optuna.create_study(
            study_name="planish",
            directions=[StudyDirection.MAXIMIZE if d == "maximize" else StudyDirection.MINIMIZE for d in directions],
            storage=self._storage,
            sampler=optuna.samplers.RandomSampler(seed=seed),
        )

    def inform(self, task: SamplerTask) -> None:
        """From here on, what is proposed follows from the table of options."""
        self._task = task
        if self._sampler == "planish":
            self._planish = planish_sampler(task, self._seed)
        if self._sampler == "dp":
            self._policies = program_candidates(task.table, [o.metric for o in task.objectives])

    def ask(self, batch: int, count: int, fixed: Sequence[Candidate] = ()) -> list[Candidate]:
        """The candidates of a batch.

        Args:
            batch: 0, 1, ...; every batch is asked once, in order.
            count: How many; fewer come back only where the space has no more, or no more policies to open with.
            fixed: Candidates that are known to start the batch, as a journal tells; the others are proposed.
        """
        candidates: list[Candidate] = []
        for place in range(count):
            # A seed for every place of the batch: what is proposed after the known ones does not depend on how many
            # of those there are, so a batch that a kill cut short is completed as it would have been.
            self._study.sampler = self._planish or _sampler(self._sampler, _seed(self._seed, batch, place))
            if place < len(fixed):
                candidates.append(self._fixed(fixed[place]))
                continue
            candidate = self._propose(batch, place)
            if candidate is None:
                break
            candidates.append(candidate)
        return candidates

    def tell(
        self, candidate: Candidate, values: Sequence[float] | None, attributes: Mapping[str, float] | None = None
    ) -> None:
        """Reports a candidate's values in the order of the directions; None (or a NaN) if it failed.

        Args:
            candidate: One that was asked.
            values: Of the objectives.
            attributes: What else is known: `DIVERGENCE` of its outputs from the original's, in nats, and, by `COST` and
                the name, costs that have a limit and are no objective, relative to the original's.
        """
        trial = self._asked[candidate.key()]
        assert trial is not None
        for name, value in (attributes or {}).items():
            trial.set_user_attr(name, value)
        values = self._noted(candidate, values, attributes or {})
        if values is None:
            self._study.tell(trial, state=_fail())
        else:
            self._study.tell(trial, list(values))

    def replay(
        self, batch: int, finished: Sequence[tuple[Candidate, Sequence[float] | None, Mapping[str, float]]]
    ) -> None:
        """Takes a whole batch that was asked and told in an earlier session: candidates, values, attributes."""
        if self._sampler in _STATEFUL:
            candidates = [candidate for candidate, _, _ in finished]
            self.ask(batch, len(finished), candidates)
            for each in finished:
                self.tell(*each)
            return
        told = []
        for candidate, values, attributes in finished:
            self._note(candidate, None)
            told.append((candidate, self._noted(candidate, values, attributes), attributes))
        add_finished(self._study, self._storage, self._distributions, told)

    def close(self) -> None:
        """Waits until what was told is on the disk."""
        self._log.close()

    def _noted(
        self, candidate: Candidate, values: Sequence[float] | None, attributes: Mapping[str, object]
    ) -> Sequence[float] | None:
        """Keeps what was told beside the study; the values, or None where one of them is not finite."""
        if self._task is not None:
            row = tuple(int(level) for level in self._space.encode(candidate))
            place = next(i for i, o in enumerate(self._task.objectives) if o.metric == "accuracy")
            self._accuracy[row] = None if values is None else values[place]
        if values is not None and not all(math.isfinite(value) for value in values):
            values = None
        self._log.add(candidate, values, attributes)
        return values

    def _propose(self, batch: int, place: int) -> Candidate | None:
        """The next candidate that was not proposed before; None where none is found."""
        policy = self._next_policy()
        if policy is not None:
            return self._fixed(policy)
        if self._sampler in OPENS and self._task is None:
            return None
        step = self._next_step()
        if step is not None:
            return self._fixed(step)
        for attempt in range(_TRIES):
            if attempt == _REPETITIONS:
                # A repetition tells a sampler nothing, so one that is sure of itself (TPE) would repeat it for ever.
                self._study.sampler = _sampler("random", _seed(self._seed, batch, place))
            if len(self._rows) >= self._space.size():
                return None
            trial = self._study.ask()
            candidate = Candidate(
                {c.name: trial.suggest_categorical(c.name, list(c.options)) for c in self._space.choices}
            )
            if self._model(candidate) not in self._rows:
                self._note(candidate, trial)
                return candidate
            self._study.tell(trial, state=_fail())
        return None

    def _next_policy(self) -> Candidate | None:
        """Policies come first: all of them for `grid` and `dp`, a few generations for the evolutionary samplers.

        `planish` takes them for as long as it has no table.
        """
        if self._sampler in ("random", "tpe", "gp", "netadapt") or (self._sampler in OPENS and self._task is not None):
            return None
        if self._sampler not in ("grid", "dp") and sum(p.key() in self._asked for p in self._policies) >= POLICIES:
            return None
        return next((p for p in self._policies if self._model(p) not in self._rows), None)

    def _next_step(self) -> Candidate | None:
        """The next candidate of NetAdapt's walk; None where it has ended, and for other samplers."""
        if self._sampler != "netadapt" or self._task is None:
            return None
        costs = self._task.goals.additive(self._task.table)
        pending = [tuple(int(level) for level in self._space.encode(candidate)) for candidate in self._candidates]
        while costs:
            row = next_of_walk(self._task.table, costs[0], self._accuracy, pending)
            if row is None:
                return None
            candidate = self._space.decode(row)
            twin = self._rows.get(self._model(candidate))
            if twin is None:
                return candidate
            # The same model by other options: what that comes to counts for this, too. The original is no step.
            if twin in self._accuracy or not any(twin):
                self._accuracy[row] = self._accuracy.get(twin)
            else:
                pending.append(row)
        return None

    def _fixed(self, candidate: Candidate) -> Candidate:
        self._study.enqueue_trial(dict(candidate.options))
        trial = self._study.ask()
        for choice in self._space.choices:
            trial.suggest_categorical(choice.name, list(choice.options))
        self._note(candidate, trial)
        return candidate

    def _model(self, candidate: Candidate) -> str:
        """What tells candidates apart: equal for those that give the same model."""
        key = candidate.key()
        if key not in self._keys:
            self._keys[key] = self._simplified(candidate).key()
        return self._keys[key]

    def _note(self, candidate: Candidate, trial: optuna.trial.Trial | None) -> None:
        self._rows.setdefault(self._model(candidate), tuple(int(level) for level in self._space.encode(candidate)))
        self._asked[candidate.key()] = trial
        self._candidates.append(candidate)


def opening(sampler: str, batch: int, trials: int) -> int:
    """How many candidates a sampler proposes before it has its table; 0 for those that open with none.

    Args:
        sampler: One of `SAMPLERS`.
        batch: Candidates of a batch.
        trials: Candidates of the whole search.
    """
    return min(batch, max(1, trials // _OPENING_SHARE)) if sampler in OPENS else 0


def uniform_policies(space: SearchSpace) -> list[Candidate]:
    """Candidates that treat every site alike, those of different cost first.

    The uniform grid beats unseeded evolutionary samplers at small budgets, so it is where they start. Its order: each
    width of the numbers with each level of pruning, quantised ones first because they are the fast half; then block
    types and ranks on the narrowest, the whole, and what is between; what changes storage alone is last.
    """
    kinds = {kind: max((len(c.options) for c in space.choices if c.kind is kind), default=1) for kind in Kind}
    bits, prune = range(kinds[Kind.BITS]), range(kinds[Kind.PRUNE])
    quantised, blocks = min(1, kinds[Kind.BITS] - 1), range(1, kinds[Kind.BLOCK])
    levels: list[dict[Kind, int]] = [{Kind.BITS: b, Kind.PRUNE: p} for b in bits[1:] for p in prune]
    narrowest = prune[-1]
    levels += [{Kind.BLOCK: level, Kind.PRUNE: narrowest, Kind.BITS: b} for b in bits[1:] for level in blocks]
    levels += [
        {kind: level, Kind.PRUNE: p, Kind.BITS: quantised}
        for p in _ends_first(prune)
        for kind in (Kind.BLOCK, Kind.RANK)
        for level in range(1, kinds[kind])
    ]
    levels += [{Kind.PRUNE: p} for p in prune]
    levels += [
        {kind: level, Kind.BITS: b}
        for kind in (Kind.RANK, Kind.BLOCK, Kind.CLUSTER)
        for b in bits
        for level in range(1, kinds[kind])
    ]
    found: dict[str, Candidate] = {}
    for level in levels:
        candidate = Candidate({c.name: _at_level(c, level.get(c.kind, 0), kinds[c.kind]) for c in space.choices})
        found.setdefault(candidate.key(), candidate)
    return [candidate for candidate in found.values() if candidate.key() != space.original().key()]


def _ends_first(levels: range) -> list[int]:
    """The last, the first, the last but one, the second, ..."""
    return sorted(levels, key=lambda level: (min(level, len(levels) - 1 - level), -level))


def strongest(space: SearchSpace, *, quantised: bool = True) -> list[Candidate]:
    """Candidates at the cheap end of the space: what is reachable at all is near the best of them.

    Args:
        space: Of the candidates.
        quantised: With the least bits; else with all of them.
    """
    last = {kind: max((len(c.options) for c in space.choices if c.kind is kind), default=1) - 1 for kind in Kind}
    wanted: list[Mapping[Kind, int]] = [
        {Kind.PRUNE: last[Kind.PRUNE], Kind.BITS: last[Kind.BITS], Kind.BLOCK: last[Kind.BLOCK]},
        {Kind.PRUNE: last[Kind.PRUNE], Kind.BITS: last[Kind.BITS], Kind.RANK: last[Kind.RANK]},
        {Kind.PRUNE: last[Kind.PRUNE], Kind.BITS: last[Kind.BITS]},
    ]
    if not quantised:
        wanted = [{**levels, Kind.BITS: 0} for levels in wanted]
    elif not last[Kind.BITS]:
        # What bits would make small, codebooks do.
        wanted += [{**levels, Kind.CLUSTER: last[Kind.CLUSTER]} for levels in wanted]
    found: dict[str, Candidate] = {}
    for level in wanted:
        candidate = Candidate({c.name: _at_level(c, level.get(c.kind, 0), last[c.kind] + 1) for c in space.choices})
        found.setdefault(candidate.key(), candidate)
    return [candidate for candidate in found.values() if candidate.key() != space.original().key()]


def _at_level(choice: Choice, level: int, levels: int) -> Any:
    """The option at a level of 0 to levels - 1: a choice with fewer options reaches its last at the last level."""
    if level == 0 or levels < 2:
        return choice.options[0]
    position = max(1, round(level * (len(choice.options) - 1) / (levels - 1)))
    return choice.options[position]


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
    if name == "nsga3":
        with warnings.catch_warnings():
            # Its interface may change: constraints.txt pins it, and nobody who searches needs to know.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.NSGAIIISampler(population_size=_POPULATION, seed=seed)
    if name == "gp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=_POPULATION)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_POPULATION)
    return optuna.samplers.RandomSampler(seed=seed)


def _fail() -> optuna.trial.TrialState:
    import optuna

    return optuna.trial.TrialState.FAIL


def _seed(seed: int, batch: int, place: int) -> int:
    digest = hashlib.sha256(f"sampler:{seed}:{batch}:{place}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
