"""The sampler of the name `planish`: the option table's best trade-offs, corrected by what was evaluated so far.

An Optuna sampler like any other: everything it knows of candidates it reads from the study. What it proposes depends on
the trials that are complete and on those that run (they count as being what they are predicted to be), so a batch is
the same however many workers evaluate it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..spaces.space import Candidate
from .objective import Objective
from .option_table import OptionTable, levels_of
from .pareto import non_dominated, nondominated_rank
from .refine import AfterTraining, AsTheyAre, Axis, Chooser, Goals, least_error, pool, within_limits
from .study_space import distributions_of
from .surrogate import Evaluated, Levels, Surrogate

if TYPE_CHECKING:
    import optuna

# The user attributes of a trial that hold its divergence from the original's outputs, and costs that are not traded off
# and have a limit, relative to the original's.
DIVERGENCE, COST = "divergence", "cost "
_ELITE = 32
# Candidates that a surrogate is fitted to at most.
_MOST = 600


@dataclass(frozen=True)
class SamplerTask:
    """What the sampler needs to know of a search beside its space.

    Attributes:
        table: Of the options.
        objectives: In the order in which values are told.
        original: Their values for the original.
        limits: The most of a cost, relative to the original; costs that are no objectives may have one, too.
        classes: Of the task; 0 where it has none.
        trained: Candidates are trained after the search: every second one is chosen by what training may make of it.
        least_accuracy: Of a result; 0 where the budget does not say.
        epochs: Of the longest training that follows, over all that there is to train on.
    """

    table: OptionTable
    objectives: tuple[Objective, ...]
    original: tuple[float, ...]
    limits: Mapping[str, float]
    classes: int = 0
    trained: bool = True
    least_accuracy: float = 0.0
    epochs: float = 5.0

    @property
    def goals(self) -> Goals:
        """What is made better."""
        loss = next(1 - v for o, v in zip(self.objectives, self.original, strict=True) if o.metric == "accuracy")
        costs = tuple(o.metric for o in self.objectives if o.metric != "accuracy")
        top = 1 - 1 / self.classes if self.classes > 1 else 1.0
        return Goals(costs, loss, top, self.limits, 1 - self.least_accuracy, self.epochs, self._least_error)

    @cached_property
    def _least_error(self) -> float:
        """Of what keeps the limits; only a budget on accuracy asks for it."""
        return least_error(self.table, self.limits) if self.least_accuracy else 0.0

    @cached_property
    def within_limits(self) -> Levels:
        """Candidates that keep all limits at once, as the table sees them."""
        return within_limits(self.table, self.goals)

    def hopeless(self, candidates: Sequence[Candidate]) -> list[bool]:
        """Of which training is not expected to make a result that keeps the budget on accuracy."""
        levels = levels_of(self.table.space, candidates)
        return [bool(one) for one in AfterTraining(self.table, self.goals).hopeless(levels)]


def planish_sampler(task: SamplerTask, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of a task; keep one for a whole study, because it remembers its fits."""
    import optuna

    space = task.table.space
    distributions = distributions_of(space)

    class PlanishSampler(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self._batch: tuple[tuple[int, ...], _Batch] | None = None
            # Levels of trials that are not complete, by their number.
            self._rows: dict[int, tuple[int, ...]] = {}

        def infer_relative_search_space(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial
        ) -> dict[str, optuna.distributions.BaseDistribution]:
            return distributions

        def sample_relative(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            search_space: dict[str, optuna.distributions.BaseDistribution],
        ) -> dict[str, Any]:
            states = optuna.trial.TrialState
            others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
            complete = [t for t in others if t.state == states.COMPLETE]
            key = tuple(t.number for t in complete)
            if self._batch is None or self._batch[0] != key:
                self._batch = key, _Batch(task, [_told(t) for t in complete], _seed(seed, len(key)))
            # Failed ones too: asked for again they would fail again.
            rest = [t for t in others if t.state != states.COMPLETE and len(t.params) == len(space.choices)]
            for each in rest:
                if each.number not in self._rows:
                    self._rows[each.number] = tuple(int(x) for x in space.encode(Candidate(dict(each.params))))
            running = [t.state in (states.RUNNING, states.WAITING) for t in rest]
            chosen = self._batch[1].next([self._rows[t.number] for t in rest], running)
            return dict(chosen.options)

        def sample_independent(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            param_name: str,
            param_distribution: optuna.distributions.BaseDistribution,
        ) -> Any:
            # Only what is not of this space is asked for here.
            return optuna.samplers.RandomSampler(seed=seed).sample_independent(
                study, trial, param_name, param_distribution
            )

    return PlanishSampler()


@dataclass(frozen=True)
class _Told:
    options: Mapping[str, Any]
    values: tuple[float, ...]
    attributes: Mapping[str, Any]

    def attribute(self, name: str) -> float:
        value = self.attributes.get(name)
        return math.nan if value is None else float(value)


class _Batch:
    """The proposals between two tellings."""

    def __init__(self, task: SamplerTask, told: Sequence[_Told], seed: int) -> None:
        self._task, self._seed, self._rng = task, seed, np.random.default_rng(seed)
        space = task.table.space
        accuracy = next(i for i, o in enumerate(task.objectives) if o.metric == "accuracy")
        self._goals = task.goals
        names = (*self._goals.costs, *self._goals.kept)
        seen = _evaluated(task, told, accuracy)
        known = {tuple(int(level) for level in row) for row in seen.levels}
        fitted = _thinned(seen, self._goals.costs)
        self._surrogate = Surrogate(task.table, fitted, names, self._goals.base_loss, self._goals.top_loss, seed)
        self._levels = self._pool(seen)
        trained = AfterTraining(task.table, self._goals) if task.trained else None
        axes: list[Axis] = [AsTheyAre(self._surrogate, trained), *([trained] if trained else [])]
        self._choosers = [Chooser(self._surrogate, axis, self._goals, seen, self._rng) for axis in axes]
        self._gains = [chooser.gains(self._levels) for chooser in self._choosers]
        self._counted: set[tuple[int, ...]] = set()
        self._places = {tuple(int(level) for level in row): place for place, row in enumerate(self._levels)}
        self._taken = {place for key, place in self._places.items() if key in known}
        self._space = space

    def next(self, others: Sequence[tuple[int, ...]], running: Sequence[bool]) -> Candidate:
        """The next candidate beside others that are running or have failed, as levels."""
        for key, runs in zip(others, running, strict=True):
            place = self._places.get(key)
            if place is not None:
                self._taken.add(place)
            if runs and key not in self._counted:
                self._counted.add(key)
                for chooser, gains in zip(self._choosers, self._gains, strict=True):
                    chooser.count(gains[place] if place is not None else chooser.gains(np.array([key]))[0])
        turn = len(self._counted) % len(self._choosers)
        chosen = self._choosers[turn].choose(self._gains[turn], self._taken)
        if chosen is None:
            # From numbers of its own: a batch that a kill cut short asks for fewer.
            return self._space.sample(np.random.default_rng([self._seed, len(others)]))
        return self._space.decode(self._levels[chosen])

    def _pool(self, seen: Evaluated) -> Levels:
        elite = seen.levels
        if len(elite):
            losses = np.stack([seen.loss, *(seen.costs[name] for name in self._goals.costs)], 1)
            front = elite[non_dominated(losses)]
            # By harm too: what is useless before training is on no front.
            harmless = np.stack(
                [self._surrogate.harm(elite).mean, *(seen.costs[name] for name in self._goals.costs)], 1
            )
            elite = np.unique(np.concatenate([front, elite[non_dominated(harmless)]]), axis=0)
            if len(elite) > _ELITE:
                elite = elite[self._rng.choice(len(elite), _ELITE, replace=False)]
        found = pool(self._task.table, self._goals, elite, self._rng)
        return np.unique(np.concatenate([found, self._task.within_limits]), axis=0)


def _thinned(seen: Evaluated, costs: Sequence[str]) -> Evaluated:
    """The candidates that a surrogate is fitted to: all, or the best and the newest of very many.

    A fit takes longer the more there are, and what is far from the front says little about it.
    """
    if len(seen.levels) <= _MOST:
        return seen
    half = _MOST // 2
    older = len(seen.levels) - half
    losses = np.stack([seen.loss, *(seen.costs[name] for name in costs)], 1)[:older]
    best = np.argsort(nondominated_rank(losses, half), kind="stable")[:half]
    rows = np.concatenate([np.sort(best), np.arange(older, len(seen.levels))])
    return Evaluated(
        seen.levels[rows], seen.loss[rows], seen.divergence[rows], {k: v[rows] for k, v in seen.costs.items()}
    )


def _evaluated(task: SamplerTask, told: Sequence[_Told], accuracy: int) -> Evaluated:
    space = task.table.space
    levels = levels_of(space, [Candidate(t.options) for t in told])
    values = np.array([t.values for t in told], dtype=np.float64).reshape(len(told), len(task.objectives))
    costs = {o.metric: values[:, i] / (task.original[i] or 1.0) for i, o in enumerate(task.objectives) if i != accuracy}
    for name in task.goals.kept:
        # Where it is not known it counts as the original's.
        costs[name] = np.nan_to_num(np.array([t.attribute(COST + name) for t in told], dtype=np.float64), nan=1.0)
    divergence = np.array([t.attribute(DIVERGENCE) for t in told], dtype=np.float64)
    return Evaluated(levels, 1 - values[:, accuracy], divergence, costs)


def _told(trial: Any) -> _Told:
    return _Told(dict(trial.params), tuple(trial.values), dict(trial.user_attrs))


def _seed(seed: int, complete: int) -> int:
    return (seed * 1_000_003 + complete) % 2**31
