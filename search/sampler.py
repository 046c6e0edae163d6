"""What is evaluated next: samplers by name on an Optuna study, asked in batches of a fixed size.

A batch is a function of the run's seed, the batch's number and what was told before it, so the same search gives the
same candidates with any number of workers, and after any kill: a study is rebuilt from the journal by asking again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spaces.space import Candidate, Choice, Kind, SearchSpace
from .errors import UserError, nearest

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("grid", "random", "nsga2", "nsga3", "tpe")
# NSGA's own default of 50 would make a short search all first generation, which is random.
_POPULATION = 8
_TRIES = 40


class Proposer:
    """Asks an Optuna study for candidates that were not proposed before."""

    def __init__(self, path: Path, space: SearchSpace, sampler: str, seed: int, directions: Sequence[str]) -> None:
        """Starts a new study in `path` (`study.log`); an old one is replaced, see `ask`.

        Args:
            path: Optuna's journal.
            space: What may be proposed.
            sampler: One of `SAMPLERS`.
            seed: Of the run.
            directions: `minimize` or `maximize` for every value that will be told.
        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.study import StudyDirection

        if sampler not in SAMPLERS:
            raise UserError(f"sampler {sampler!r} is not known; {nearest(sampler, SAMPLERS)}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._sampler, self._seed = space, sampler, seed
        self._policies = uniform_policies(space)
        self._told: dict[str, optuna.trial.Trial] = {}
        self._seen = {space.original().key()}
        for old in path.parent.glob(path.name + "*"):
            old.unlink()
        self._study = optuna.create_study(
            study_name="planish",
            directions=[StudyDirection.MAXIMIZE if d == "maximize" else StudyDirection.MINIMIZE for d in directions],
            storage=JournalStorage(JournalFileBackend(str(path))),
            sampler=optuna.samplers.RandomSampler(seed=seed),
        )

    def ask(self, batch: int, count: int, fixed: Sequence[Candidate] = ()) -> list[Candidate]:
        """The candidates of a batch.

        Args:
            batch: 0, 1, ...; every batch is asked once, in order.
            count: How many; fewer come back only where the space has no more.
            fixed: Candidates that are known to start the batch, as a journal tells; the others are proposed.
        """
        self._study.sampler = _sampler(self._sampler, _seed(self._seed, batch))
        candidates = [self._fixed(candidate) for candidate in fixed[:count]]
        tries = 0
        while len(candidates) < count and tries < _TRIES * count and len(self._seen) < self._space.size():
            tries += 1
            policy = self._next_policy()
            if policy is not None:
                candidates.append(self._fixed(policy))
                continue
            trial = self._study.ask()
            candidate = Candidate(
                {c.name: trial.suggest_categorical(c.name, list(c.options)) for c in self._space.choices}
            )
            if candidate.key() in self._seen:
                # A repetition tells the sampler nothing: evaluate another one instead.
                self._study.tell(trial, state=_fail())
                continue
            self._note(candidate, trial)
            candidates.append(candidate)
        return candidates

    def tell(self, candidate: Candidate, values: Sequence[float] | None) -> None:
        """Reports a candidate's values in the order of the directions; None (or a NaN) if it failed."""
        trial = self._told[candidate.key()]
        if values is None or not all(math.isfinite(value) for value in values):
            self._study.tell(trial, state=_fail())
        else:
            self._study.tell(trial, list(values))

    def _next_policy(self) -> Candidate | None:
        """Uniform policies come first: all of them for `grid`, a population of them for the evolutionary samplers."""
        if self._sampler in ("random", "tpe"):
            return None
        most = len(self._policies) if self._sampler == "grid" else 2 * _POPULATION
        return next((p for p in self._policies[:most] if p.key() not in self._seen), None)

    def _fixed(self, candidate: Candidate) -> Candidate:
        self._study.enqueue_trial(dict(candidate.options))
        trial = self._study.ask()
        for choice in self._space.choices:
            trial.suggest_categorical(choice.name, list(choice.options))
        self._note(candidate, trial)
        return candidate

    def _note(self, candidate: Candidate, trial: Any) -> None:
        self._seen.add(candidate.key())
        self._told[candidate.key()] = trial


def uniform_policies(space: SearchSpace) -> list[Candidate]:
    """Candidates that treat every site alike: levels of pruning and bits first, then each other family with them.

    The uniform grid beats unseeded evolutionary samplers at small budgets, so it is where they start.
    """
    kinds = {kind: max((len(c.options) for c in space.choices if c.kind is kind), default=1) for kind in Kind}
    levels: list[dict[Kind, int]] = []
    bits = range(kinds[Kind.BITS])
    prune = range(kinds[Kind.PRUNE])
    levels += [{Kind.BITS: b, Kind.PRUNE: p} for b in bits for p in prune]
    for kind in (Kind.RANK, Kind.BLOCK, Kind.CLUSTER):
        levels += [{kind: level, Kind.BITS: b} for b in reversed(bits) for level in range(1, kinds[kind])]
    levels += [
        {kind: level, Kind.PRUNE: p, Kind.BITS: 1}
        for kind in (Kind.RANK, Kind.BLOCK)
        for p in prune[1:]
        for level in range(1, kinds[kind])
    ]
    found: dict[str, Candidate] = {}
    for level in levels:
        candidate = Candidate({c.name: _at_level(c, level.get(c.kind, 0), kinds[c.kind]) for c in space.choices})
        found.setdefault(candidate.key(), candidate)
    return [candidate for candidate in found.values() if candidate.key() != space.original().key()]


def strongest(space: SearchSpace) -> list[Candidate]:
    """Candidates at the cheap end of the space: what is reachable at all is near the best of them."""
    last = {kind: max((len(c.options) for c in space.choices if c.kind is kind), default=1) - 1 for kind in Kind}
    wanted: list[Mapping[Kind, int]] = [
        {Kind.PRUNE: last[Kind.PRUNE], Kind.BITS: last[Kind.BITS], Kind.BLOCK: last[Kind.BLOCK]},
        {Kind.PRUNE: last[Kind.PRUNE], Kind.BITS: last[Kind.BITS], Kind.RANK: last[Kind.RANK]},
        {Kind.PRUNE: last[Kind.PRUNE], Kind.BITS: last[Kind.BITS]},
    ]
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
        return optuna.samplers.NSGAIIISampler(population_size=_POPULATION, seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_POPULATION)
    return optuna.samplers.RandomSampler(seed=seed)


def _fail() -> optuna.trial.TrialState:
    import optuna

    return optuna.trial.TrialState.FAIL


def _seed(seed: int, batch: int) -> int:
    digest = hashlib.sha256(f"sampler:{seed}:{batch}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
