"""The candidate with the least summed error for every budget of one cost, exactly, from one table.

Sites are coupled through the choices that they share (the channels that a group of layers loses together). Shared
choices are eliminated one after the other (Bertele and Brioschi 1972): all tables that hang on one are added up, and
the best level of it is taken for every state of the others. A table holds the least error for every budget, so that
adding two of them is a min-plus convolution, and the whole is a knapsack on a graph instead of a chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..spaces.space import Candidate
from .option_table import Array, OptionTable, Site, every_level

BUCKETS = 1000
# States of a table: beyond it a model's channels are coupled too densely for this method.
_MOST_STATES = 4096


class TooDense(ValueError):
    """The shared choices are coupled so densely that tables over them would not fit."""


@dataclass(frozen=True)
class Budgets:
    """The best candidates for every budget from 0 to `most`.

    Attributes:
        unit: Of the cost, a bucket; costs are rounded to it.
        errors: The least summed error with at most t buckets, (buckets + 1,); infinite where nothing is so cheap.
    """

    table: OptionTable
    unit: float
    fixed: float
    errors: Array
    root: _Node

    def best(self, budget: float) -> Candidate | None:
        """The candidate of least error whose cost, rounded by site, is at most the budget; None if there is none."""
        bucket = min(int(np.floor((budget - self.fixed) / self.unit + 1e-9)), len(self.errors) - 1)
        if bucket < 0 or not np.isfinite(self.errors[bucket]):
            return None
        levels = np.zeros(len(self.table.space.choices), dtype=np.int64)
        self.root.take({}, bucket, levels)
        return self.table.space.decode(levels)

    def least(self) -> float:
        """The smallest budget for which there is a candidate; infinite where none is within the largest."""
        possible = np.flatnonzero(np.isfinite(self.errors))
        return self.fixed + self.unit * int(possible[0]) if len(possible) else np.inf


def solve(
    table: OptionTable,
    cost: str,
    *,
    buckets: int = BUCKETS,
    most: float | None = None,
    penalties: Mapping[str, float] | None = None,
    factors: tuple[Array, ...] | None = None,
) -> Budgets:
    """The best candidates for every budget of a cost.

    Args:
        table: Of the space.
        cost: The cost's name.
        buckets: Into which the range up to `most` is cut.
        most: The largest budget; by default what the original costs.
        penalties: By the name of another cost, what a unit of it counts as error: candidates between the objectives.
        factors: For every option of every choice, its error is multiplied by it.

    Raises:
        TooDense: see there.
    """
    fixed = table.fixed[cost]
    original = float(table.cost(cost, np.zeros((1, len(table.space.choices)), dtype=np.int64))[0])
    span = (original if most is None else most) - fixed
    unit = max(span, 1e-300) / buckets
    shared = sorted({place for site in table.sites for place in site.shared} | set(table.shared_errors))
    if most is None:
        # Sites that are all rounded up leave the original more buckets than it was cut into.
        buckets += (len(table.sites) + len(shared) + 1) // 2
    scale = _Scale(table, cost, unit, buckets, penalties or {}, factors)
    nodes: list[_Node] = [_SiteNode(site, scale) for site in table.sites]
    nodes += [_SharedNode(place, scale) for place in shared]
    while shared:
        # The one with the fewest neighbours first.
        place = min(shared, key=lambda p: (len({q for n in nodes if p in n.scope for q in n.scope}), p))
        touching = [node for node in nodes if place in node.scope]
        nodes = [node for node in nodes if place not in node.scope]
        nodes.append(_Least(_added(touching, scale), place))
        shared.remove(place)
    root = _added(nodes, scale)
    return Budgets(table, unit, fixed, root.errors, root)


class _Node(Protocol):
    """A table of least errors: for every level of the choices in `scope`, for every budget."""

    scope: tuple[int, ...]
    errors: Array

    def take(self, chosen: dict[int, int], bucket: int, levels: NDArray[np.int64]) -> None:
        """Writes the levels that give the least error where the scope's choices are `chosen`, in `bucket`."""
        ...


@dataclass(frozen=True)
class _Scale:
    table: OptionTable
    cost: str
    unit: float
    buckets: int
    penalties: Mapping[str, float]
    factors: tuple[Array, ...] | None

    def buckets_of(self, costs: Array) -> NDArray[np.int64]:
        return np.rint(costs / self.unit).astype(np.int64)

    def levels(self, place: int) -> int:
        return len(self.table.space.choices[place].options)

    def sizes(self, scope: tuple[int, ...]) -> tuple[int, ...]:
        sizes = tuple(self.levels(place) for place in scope)
        if prod(sizes) > _MOST_STATES:
            names = ", ".join(self.table.space.choices[place].site for place in scope)
            raise TooDense(f"the channels of {names} are coupled with one another: {prod(sizes)} states")
        return sizes


class _SiteNode:
    """The own combinations of a site."""

    def __init__(self, site: Site, scale: _Scale) -> None:
        self.scope, self._site = site.shared, site
        errors = site.errors.copy()
        if scale.factors is not None:
            errors = np.zeros(len(errors))
            for column, place in enumerate(site.own):
                weighted = scale.table.option_errors[place] * scale.factors[place]
                errors += weighted[site.combinations[:, column]]
        sizes = scale.sizes(site.shared)
        self.errors = np.full((*sizes, scale.buckets + 1), np.inf)
        self._rows = np.zeros((*sizes, scale.buckets + 1), dtype=np.int64)
        for state in every_level(sizes):
            spent = scale.buckets_of(site.costs[scale.cost][state])
            paid = errors + sum(
                (site.costs[name][state] * weight for name, weight in scale.penalties.items()), np.zeros(len(errors))
            )
            for row in np.argsort(-paid, kind="stable"):
                # The smallest error is written last.
                if spent[row] <= scale.buckets:
                    first = max(int(spent[row]), 0)
                    better = self.errors[state][first:] >= paid[row]
                    self.errors[state][first:][better] = paid[row]
                    self._rows[state][first:][better] = row

    def take(self, chosen: dict[int, int], bucket: int, levels: NDArray[np.int64]) -> None:
        row = self._rows[(*(chosen[place] for place in self.scope), bucket)]
        levels[list(self._site.own)] = self._site.combinations[row]


class _SharedNode:
    """What a shared choice spoils, and costs outside of all sites."""

    def __init__(self, place: int, scale: _Scale) -> None:
        self.scope: tuple[int, ...] = (place,)
        levels = scale.levels(place)
        errors = scale.table.shared_errors.get(place, np.zeros(levels)).copy()
        if scale.factors is not None:
            errors = errors * scale.factors[place]
        for name, weight in scale.penalties.items():
            errors = errors + weight * scale.table.shared_costs.get(name, {}).get(place, np.zeros(levels))
        own = scale.table.shared_costs.get(scale.cost, {}).get(place, np.zeros(levels))
        spent = np.maximum(scale.buckets_of(own), 0)
        self.errors = np.where(np.arange(scale.buckets + 1)[None] >= spent[:, None], errors[:, None], np.inf)

    def take(self, chosen: dict[int, int], bucket: int, levels: NDArray[np.int64]) -> None:
        levels[self.scope[0]] = chosen[self.scope[0]]


class _Nothing:
    """Costs nothing and spoils nothing."""

    def __init__(self, buckets: int) -> None:
        self.scope: tuple[int, ...] = ()
        self.errors = np.zeros(buckets + 1)

    def take(self, chosen: dict[int, int], bucket: int, levels: NDArray[np.int64]) -> None:
        """Nothing to choose."""


class _Sum:
    """Two tables that share a budget."""

    def __init__(self, first: _Node, second: _Node, scale: _Scale) -> None:
        self.scope = tuple(sorted({*first.scope, *second.scope}))
        self._first, self._second = first, second
        sizes = scale.sizes(self.scope)
        self.errors = np.empty((*sizes, scale.buckets + 1))
        self._given = np.empty((*sizes, scale.buckets + 1), dtype=np.int32)
        for state in every_level(sizes):
            levels = dict(zip(self.scope, state, strict=True))
            own = [node.errors[tuple(levels[place] for place in node.scope)] for node in (first, second)]
            self.errors[state], self._given[state] = _convolved(*own)

    def take(self, chosen: dict[int, int], bucket: int, levels: NDArray[np.int64]) -> None:
        given = int(self._given[(*(chosen[place] for place in self.scope), bucket)])
        self._first.take(chosen, bucket - given, levels)
        self._second.take(chosen, given, levels)


class _Least:
    """A table in which the best level of one choice was taken."""

    def __init__(self, node: _Node, place: int) -> None:
        self._node, self._place = node, place
        axis = node.scope.index(place)
        self.scope = tuple(p for p in node.scope if p != place)
        self._levels = node.errors.argmin(axis)
        self.errors = node.errors.min(axis)

    def take(self, chosen: dict[int, int], bucket: int, levels: NDArray[np.int64]) -> None:
        level = int(self._levels[(*(chosen[place] for place in self.scope), bucket)])
        self._node.take({**chosen, self._place: level}, bucket, levels)


def _added(nodes: list[_Node], scale: _Scale) -> _Node:
    """The sum of tables, those with the fewest choices first."""
    total: _Node = _Nothing(scale.buckets)
    for node in sorted(nodes, key=lambda n: len(n.scope)):
        total = _Sum(total, node, scale)
    return total


def _convolved(first: Array, second: Array) -> tuple[Array, NDArray[np.int32]]:
    """min over s of first[t - s] + second[s] for every t, and the s.

    Both fall from left to right, so that s need only be where the one with fewer steps takes a step.
    """
    steps = [np.flatnonzero(part < np.concatenate([[np.inf], part[:-1]])) for part in (first, second)]
    swapped = len(steps[0]) < len(steps[1])
    long, short, places = (second, first, steps[0]) if swapped else (first, second, steps[1])
    best, given = np.full(len(long), np.inf), np.zeros(len(long), dtype=np.int32)
    for place in places:
        candidate = long[: len(long) - place] + short[place]
        better = candidate < best[place:]
        best[place:][better] = candidate[better]
        given[place:][better] = place
    if swapped:
        given = (np.arange(len(long)) - given).astype(np.int32)
    return best, given
