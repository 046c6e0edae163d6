"""Which candidates to evaluate next: a pool around the best trade-offs, chosen by expected hypervolume improvement."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..spaces.space import Candidate
from .dynamic_program import TooDense, solve
from .integer_program import best_within
from .option_table import Array, OptionTable, levels_of
from .pareto import non_dominated
from .surrogate import Evaluated, Guess, Levels, Surrogate

_log = logging.getLogger(__name__)
# Perturbed tables whose fronts enter a pool, budgets taken from each, and buckets of their dynamic programs.
_FRONTS = 6
_BUDGETS = 40
_BUCKETS = 400
# How far an option's error is perturbed: the standard deviation of log(joint / summed) of small experiments.
_SPREAD = 0.4
_MUTANTS = 400
# Budgets of the sampler that is the dynamic program alone.
_POLICY_BUDGETS = 129
# Candidates that keep several limits at once, how far inside of them (predictions err), the nodes for each, and
# parts of the first cost that they are asked for, too, where a limit is on what is not traded off.
_WITHIN, _INSIDE, _WITHIN_NODES, _PARTS = 4, 0.95, 100, (0.7, 0.5, 0.35, 0.25)
# Points of the space of losses in which improvements are counted.
_POINTS = 3000
_TRIED_POINTS = 60000
# What n epochs leave of a summed error e: a damage of LEFT n^-FALL e^POWER, fitted to what 1 to 12 epochs left of
# sixteen of CIFAR-10's ResNet-20 (its logarithm errs by 0.23 there, by more elsewhere; an epoch of few images leaves
# more). What is taken for its standard deviation, and the damage from which on nothing useful is left.
_LEFT, _LEFT_FALL, _LEFT_POWER = 0.15, 0.5, 1.2
# Less than that of an epoch is not told apart.
_LEAST_EPOCHS = 0.1
# How steeply what training is not expected to bring far enough counts as worse than it is. Where a limit on a cost
# permits nothing else, the nearest of it still goes before the rest.
_HOPELESS = 4
_TRAINED_STD = 0.5
_WORST_DAMAGE = 0.43
# A budget on accuracy below what training is known to leave still leaves something to be chosen by; the greatest harm.
_LEAST_ERROR, _DESTROYED = 0.05, 1e9


@dataclass(frozen=True)
class Goals:
    """What is made better.

    Attributes:
        costs: Names, in the order of the losses behind the first, which is 1 - accuracy.
        base_loss: The original's 1 - accuracy.
        top_loss: Of a model that knows nothing.
        limits: The most of a cost, relative to the original: what is beyond it gains nothing. Costs that are not
            traded off may have one, too.
        most_loss: Of a result, which is trained: what training is not expected to bring so far gains nothing.
        epochs: Of the longest training that follows, over all that there is to train on.
        least_error: The summed error of the best that the limits permit: what is near to it is proposed even where
            training is not expected to bring it as far as `most_loss`.
    """

    costs: tuple[str, ...]
    base_loss: float
    top_loss: float
    limits: Mapping[str, float]
    most_loss: float = 1.0
    epochs: float = 5.0
    least_error: float = 0.0

    @property
    def kept(self) -> tuple[str, ...]:
        """The costs that have a limit and are not traded off."""
        return tuple(name for name in self.limits if name not in self.costs)

    def additive(self, table: OptionTable) -> list[str]:
        """The costs of these that add up over a table's sites; where none does, whatever does stands for them."""
        return [name for name in (*self.costs, *self.kept) if name in table.fixed] or list(table.fixed)


def pool(table: OptionTable, goals: Goals, elite: Levels, rng: np.random.Generator, *, fronts: int = _FRONTS) -> Levels:
    """Candidates near the best trade-offs, without repetitions, shape (n, n_choices).

    Args:
        table: Of the space.
        goals: What is traded off.
        elite: The best candidates so far, (m, n_choices): they are mutated and crossed.
        rng: Of all that is random.
        fronts: Dynamic programs with perturbed errors.
    """
    found = [_front(table, goals, rng, perturbed=number > 0) for number in range(fronts)]
    from_programs = np.concatenate(found) if found else np.zeros((0, len(table.space.choices)), dtype=np.int64)
    parents = np.concatenate([elite, from_programs]) if len(elite) else from_programs
    if not len(parents):
        parents = np.zeros((1, len(table.space.choices)), dtype=np.int64)
    children = np.stack([_child(table, parents, rng) for _ in range(_MUTANTS)])
    found_all = np.unique(np.concatenate([from_programs, children]), axis=0)
    # A mutant may have an option that could not be fitted.
    return found_all[np.isfinite(table.error(found_all))]


def within_limits(table: OptionTable, goals: Goals) -> Levels:
    """Where several costs have limits: candidates of least error that keep all of them, apart from each other.

    The dynamic program knows one budget; candidates of its fronts that keep several limits are found by luck. One limit
    is another one than that budget where it is on a cost that is not traded off: candidates that keep it are then found
    for parts of the first cost, too.
    """
    limits = {name: limit for name, limit in goals.limits.items() if name in table.fixed}
    found: list[Candidate] = []
    zero = np.zeros((1, len(table.space.choices)), dtype=np.int64)
    absolute = {name: limit * _INSIDE * float(table.cost(name, zero)[0]) for name, limit in limits.items()}
    beside = any(name in limits for name in goals.kept)
    distance = 1 + len(table.space.choices) // 20
    while (len(limits) > 1 or beside) and len(found) < _WITHIN:
        candidate = best_within(table, absolute, apart=found, distance=distance, nodes=_WITHIN_NODES)
        if candidate is None:
            return levels_of(table.space, found)
        found.append(candidate)
    traded = next((name for name in goals.costs if name in table.fixed), None)
    if not beside or traded is None:
        return levels_of(table.space, found)
    for part in _PARTS:
        most = min(absolute.get(traded, np.inf), part * float(table.cost(traded, zero)[0]))
        candidate = best_within(table, {**absolute, traded: most}, nodes=_WITHIN_NODES)
        if candidate is None:
            break
        found.append(candidate)
    return levels_of(table.space, found)


def least_error(table: OptionTable, limits: Mapping[str, float]) -> float:
    """The summed error of the best candidate that keeps limits relative to the original; 0 where they permit none."""
    zero = np.zeros((1, len(table.space.choices)), dtype=np.int64)
    absolute = {n: limit * float(table.cost(n, zero)[0]) for n, limit in limits.items() if n in table.fixed}
    best = best_within(table, absolute, nodes=_WITHIN_NODES) if absolute else None
    return 0.0 if best is None else float(table.error(levels_of(table.space, [best]))[0])


def program_candidates(table: OptionTable, costs: Sequence[str]) -> list[Candidate]:
    """The dynamic program's best of budgets over the whole range of the first cost that adds up over sites.

    In the order of a bisection: the ends, the middle, the quarters, ... so that any number of them covers the range.
    """
    goals = Goals(tuple(costs), 0.0, 1.0, {})
    rows = _front(table, goals, np.random.default_rng(0), perturbed=False, budgets=_POLICY_BUDGETS)
    found = {tuple(int(level) for level in rows[place]): None for place in _bisected(len(rows))}
    return [table.space.decode(row) for row in found if any(row)]


def _bisected(count: int) -> list[int]:
    """0 to count - 1: the ends, the middle, the quarters, ..."""
    order = [0, count - 1] if count > 1 else list(range(count))
    spans = [(0, count - 1)]
    while spans:
        low, high = spans.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            spans += [(low, middle), (middle, high)]
    return order


@cache
def _tell(reason: str) -> None:
    """Once in a search."""
    _log.warning("candidates are proposed without the dynamic program: %s", reason)


def _front(
    table: OptionTable, goals: Goals, rng: np.random.Generator, perturbed: bool, budgets: int = _BUDGETS
) -> Levels:
    """The best candidates of many budgets of one cost, errors perturbed, other costs as penalties."""
    additive = goals.additive(table)
    if not additive:
        return np.zeros((0, len(table.space.choices)), dtype=np.int64)
    cost = additive[int(rng.integers(len(additive)))] if perturbed else additive[0]
    factors = None
    if perturbed:
        factors = tuple(np.exp(rng.normal(0, _SPREAD, len(errors))) for errors in table.option_errors)
    zero = np.zeros((1, len(table.space.choices)), dtype=np.int64)
    whole = {name: float(table.cost(name, zero)[0]) for name in additive}
    # An error of 1 is a model destroyed; a hundredth to a hundred times that for the whole of another cost.
    penalties = {name: 10 ** rng.uniform(-2, 1.5) / whole[name] for name in additive if name != cost and perturbed}
    try:
        solved = solve(table, cost, buckets=_BUCKETS, penalties=penalties, factors=factors)
    except TooDense as error:
        _tell(str(error))
        return np.zeros((0, len(table.space.choices)), dtype=np.int64)
    low = max(solved.least(), 1e-6 * whole[cost])
    asked = np.exp(np.linspace(np.log(low), np.log(max(low, whole[cost])), budgets))
    best = [candidate for budget in asked if (candidate := solved.best(float(budget) * (1 + 1e-9))) is not None]
    return np.array([table.space.encode(candidate) for candidate in best], dtype=np.int64).reshape(
        len(best), len(table.space.choices)
    )


def _child(table: OptionTable, parents: Levels, rng: np.random.Generator) -> Levels:
    """A parent with a few choices changed or taken from another parent."""
    child: Levels = parents[int(rng.integers(len(parents)))].copy()
    if rng.random() < 0.5:
        other = parents[int(rng.integers(len(parents)))]
        # Whole sites: the choices of one belong together.
        for site in table.sites:
            if rng.random() < 0.3:
                child[list(site.own)] = other[list(site.own)]
        for place in table.shared_errors:
            if rng.random() < 0.3:
                child[place] = other[place]
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.5 and table.sites:
            site = table.sites[int(rng.integers(len(table.sites)))]
            if len(site.own):
                child[list(site.own)] = site.combinations[int(rng.integers(len(site.combinations)))]
        else:
            place = int(rng.integers(len(child)))
            count = len(table.space.choices[place].options)
            child[place] = int(np.clip(child[place] + rng.choice((-1, 1)), 0, count - 1))
    return child


class Axis(Protocol):
    """A view of candidates' losses: by what harms them, and what loss goes with a harm."""

    worst_loss: float

    def harm(self, levels: Levels) -> Guess:
        """Positive; the standard deviation is that of its logarithm."""
        ...

    def harm_at(self, loss: Array) -> Array:
        """The harm that goes with a loss."""
        ...

    def losses(self, seen: Evaluated) -> Array:
        """Those of candidates that were evaluated."""
        ...


class AsTheyAre:
    """Candidates before training."""

    def __init__(self, surrogate: Surrogate, trained: AfterTraining | None = None) -> None:
        """With `trained`, what training is not expected to bring far enough counts as worse than it is."""
        self._surrogate, self._trained = surrogate, trained
        # What knows nothing is no result of training; of candidates that stay as they are it is one.
        self.worst_loss = 1.0 if trained is None else surrogate.top_loss

    def harm(self, levels: Levels) -> Guess:
        """See `Axis`."""
        found = self._surrogate.harm(levels)
        if self._trained is None:
            return found
        return Guess(found.mean * self._trained.beyond(levels), found.std)

    def harm_at(self, loss: Array) -> Array:
        """See `Axis`."""
        return self._surrogate.harm_at(loss)

    def losses(self, seen: Evaluated) -> Array:
        """See `Axis`."""
        return seen.loss


def left(epochs: float) -> float:
    """What so many epochs leave of a damage, relative to what one leaves, the learning rate down at their end."""
    return float(max(epochs, _LEAST_EPOCHS) ** -_LEFT_FALL)


class AfterTraining:
    """Candidates as training may leave them, by the summed error of their options.

    What a candidate computes before training tells little of it once it is far from the original: all divergences are
    alike then. The summed errors still rise, and so does what training cannot take back: of an error of 0.6 six points
    after one epoch of CIFAR-10, three after six. The fewer epochs follow, the more is left.
    """

    def __init__(self, table: OptionTable, goals: Goals) -> None:
        self._table, self._base = table, goals.base_loss
        self._span = max(goals.top_loss - goals.base_loss, 0.01)
        self._left = _LEFT * left(goals.epochs)
        worst = self._base + self._span * -np.expm1(-_WORST_DAMAGE)
        hoped, within = (
            float(np.clip(goals.most_loss, self._loss(np.array([least]))[0], worst))
            for least in (_LEAST_ERROR, max(_LEAST_ERROR, goals.least_error))
        )
        self.worst_loss = within
        self._hopeless = self._most = np.inf
        if goals.most_loss < worst:
            # What is permitted, and as much more as predictions err by.
            self._hopeless, self._most = self.harm_at(np.array([hoped, within])) * float(np.exp(_TRAINED_STD))

    def hopeless(self, levels: Levels) -> NDArray[np.bool_]:
        """Of which candidates training is not expected to make a result that keeps the most loss."""
        return np.asarray(self._table.error(levels) > self._hopeless, dtype=np.bool_)

    def beyond(self, levels: Levels) -> Array:
        """By what harms count: 1 for all but the hopeless, of these the more the further they are from hope.

        The nearest of what limits on costs permit count as they are.
        """
        share = np.minimum(self._table.error(levels), _DESTROYED) / self._most
        return np.asarray(np.minimum(np.maximum(share, 1.0) ** _HOPELESS, _DESTROYED))

    def harm(self, levels: Levels) -> Guess:
        """See `Axis`."""
        errors = np.maximum(self._table.error(levels), 1e-9)
        return Guess(errors, np.full(len(errors), _TRAINED_STD))

    def harm_at(self, loss: Array) -> Array:
        """See `Axis`."""
        share = np.clip((loss - self._base) / self._span, 0, 1 - 1e-9)
        return np.asarray((-np.log1p(-share) / self._left) ** (1 / _LEFT_POWER))

    def losses(self, seen: Evaluated) -> Array:
        """See `Axis`."""
        return self._loss(self._table.error(seen.levels))

    def _loss(self, errors: Array) -> Array:
        return np.asarray(self._base + self._span * -np.expm1(-self._left * errors**_LEFT_POWER))


class Chooser:
    """Chooses candidates one after the other; each counts as evaluated, as well as it is predicted, for the next."""

    def __init__(
        self, surrogate: Surrogate, axis: Axis, goals: Goals, seen: Evaluated, rng: np.random.Generator
    ) -> None:
        """Points of the space of losses are drawn where something is still to be gained.

        Args:
            surrogate: Predicts costs.
            axis: How losses are seen.
            goals: What is traded off.
            seen: What was evaluated.
            rng: Of the points.
        """
        self._surrogate, self._axis, self._goals = surrogate, axis, goals
        own = np.stack([axis.losses(seen), *(seen.costs[name] for name in goals.costs)], 1)
        kept = np.ones(len(own), dtype=bool)
        for name, limit in goals.limits.items():
            kept &= seen.costs[name] <= limit
        own = own[kept]
        front = own[non_dominated(own)]
        upper = np.array([axis.worst_loss, *(min(1.0, goals.limits.get(name, 1.0)) for name in goals.costs)])
        low = np.array([goals.base_loss, *np.zeros(len(goals.costs))])
        points = low + (upper - low) * rng.random((_TRIED_POINTS, len(upper)))
        for start in range(0, len(front), 64):
            part = front[start : start + 64]
            points = points[~(part[None] <= points[:, None]).all(2).any(1)]
        self._points = points[:_POINTS]
        self._had = np.zeros(len(self._points))
        self._bounds: Array | None = None

    def gains(self, levels: Levels) -> Array:
        """For every candidate and point the probability that it is better there in everything, (n, points).

        That of keeping the limits on what is not traded off is part of it.
        """
        from scipy.special import ndtr

        harm = self._axis.harm(levels)
        wanted = np.log(np.maximum(self._axis.harm_at(self._points[:, 0]), 1e-12))
        found = ndtr((wanted[None] - np.log(harm.mean)[:, None]) / harm.std[:, None])
        for column, name in enumerate(self._goals.costs, start=1):
            guess = self._surrogate.cost(name, levels)
            wanted = np.log(np.maximum(self._points[:, column], 1e-12))
            found *= ndtr((wanted[None] - np.log(guess.mean)[:, None]) / guess.std[:, None])
        for name in self._goals.kept:
            guess = self._surrogate.cost(name, levels)
            most = np.log(max(self._goals.limits[name], 1e-12))
            found *= ndtr((most - np.log(guess.mean)) / guess.std)[:, None]
        return np.asarray(found)

    def choose(self, gains: Array, taken: Collection[int]) -> int | None:
        """The row of the largest expected gain that is not taken; None where all are.

        What is had only grows, so that a row's gain when it was last looked at bounds what it is now: rows are looked
        at again from the highest bound on, until one keeps it.

        Args:
            gains: The same (n, points) at every call.
            taken: Rows.
        """
        if self._bounds is None:
            self._bounds = np.maximum(gains - self._had, 0).sum(1)
        bounds = self._bounds
        bounds[list(taken)] = -1.0
        while len(bounds):
            row = int(bounds.argmax())
            if bounds[row] < 0:
                return None
            now = float(np.maximum(gains[row] - self._had, 0).sum())
            if now >= bounds[row]:
                return row
            bounds[row] = now
        return None

    def count(self, gains: Array) -> None:
        """One candidate's gains, (points,), are had.

        Errors of predictions count as common to all candidates: as if independent, a second copy of one would gain half
        of it again.
        """
        self._had = np.maximum(self._had, gains)
