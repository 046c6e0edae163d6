"""What every option of a space costs and spoils, site by site: candidates are predicted from it without being built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..spaces.space import Candidate, SearchSpace

Array = NDArray[np.float64]
# No candidate costs less than this share of the original.
_LEAST = 1e-3


@dataclass(frozen=True, eq=False)
class Site:
    """A layer, and what may be done to it alone.

    Its costs also hang on choices that other sites share: the channels that a group of layers loses together.

    Attributes:
        name: Of the layer.
        shared: The shared choices that its costs hang on, by their place in the space.
        own: Its own choices, by their place in the space.
        combinations: Levels of the own choices that are worth a look, shape (k, n_own); the first leaves it as it is.
        errors: Of the combinations, (k,).
        costs: By name, shape (*levels of the shared choices, k).
    """

    name: str
    shared: tuple[int, ...]
    own: tuple[int, ...]
    combinations: NDArray[np.int64]
    errors: Array
    costs: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class OptionTable:
    """Errors and costs of every site's options, and of the choices that sites share.

    A candidate's error is the sum of its options', each seen alone; its costs are the sum of its sites' and of what no
    choice changes. Both are first guesses, to be corrected by what candidates turn out to be.

    Attributes:
        space: The choices.
        shared_errors: Of every level of a shared choice, by the choice's place in the space.
        shared_costs: By name, what the levels of a shared choice cost outside of all sites, by the choice's place.
        sites: In order of execution.
        fixed: By name, what no choice changes.
        option_errors: Of every option of every choice, in the space's order.
        left_out: Options and combinations that another one beats in everything, with which.
    """

    space: SearchSpace
    shared_errors: Mapping[int, Array]
    shared_costs: Mapping[str, Mapping[int, Array]]
    sites: tuple[Site, ...]
    fixed: Mapping[str, float]
    option_errors: tuple[Array, ...]
    left_out: Mapping[str, str]

    def error(self, levels: NDArray[np.int64]) -> Array:
        """The sum of the options' errors of candidates, shape (n,), as levels (n, n_choices)."""
        found = np.zeros(len(levels))
        for place, errors in enumerate(self.option_errors):
            found += errors[levels[:, place]]
        return found

    def cost(self, name: str, levels: NDArray[np.int64]) -> Array:
        """A cost of candidates, shape (n,), as levels (n, n_choices).

        A combination that is not in a site's table counts as its nearest there: the most own choices in common, of
        these the cheapest.
        """
        total = np.full(len(levels), self.fixed[name])
        for place, costs in self.shared_costs.get(name, {}).items():
            total += costs[levels[:, place]]
        for site in self.sites:
            shared = tuple(levels[:, place] for place in site.shared)
            own = levels[:, list(site.own)]
            rows = self._rows(site, own, name)
            total += site.costs[name][(*shared, rows)]
        # What a choice saves in layers that look at it by itself may be more than other choices leave there.
        return np.maximum(total, _LEAST * self._whole(name)) if len(levels) else total

    def complete(self, levels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether every combination of candidates is in its site's table, (n,): the costs of others are guesses."""
        found = np.ones(len(levels), dtype=np.bool_)
        for site in self.sites:
            if site.own:
                found &= (levels[:, None, list(site.own)] == site.combinations[None]).all(2).any(1)
        return found

    def _whole(self, name: str) -> float:
        """The cost of the original."""
        shared = sum(float(costs[0]) for costs in self.shared_costs.get(name, {}).values())
        return self.fixed[name] + shared + sum(float(s.costs[name].reshape(-1)[0]) for s in self.sites)

    def _rows(self, site: Site, own: NDArray[np.int64], name: str) -> NDArray[np.int64]:
        if not site.own:
            return np.zeros(len(own), dtype=np.int64)
        base = site.costs[name][(0,) * len(site.shared)]
        common = (own[:, None, :] == site.combinations[None]).sum(2).astype(np.float64)
        # Of equally many in common the cheapest; a full match always wins.
        rank = common - base[None] / (base.max() + 1e-300) * 0.5
        rows: NDArray[np.int64] = rank.argmax(1)
        return rows


def undominated(
    combinations: Sequence[tuple[int, ...]], errors: Array, costs: Mapping[str, Array]
) -> tuple[list[int], dict[int, int]]:
    """The combinations that no other one beats, whatever the shared choices are, and by which the others are beaten.

    The first, which leaves the site as it is, always stays. One is beaten by another that has no larger error and no
    larger cost anywhere and is better in something; of equal ones the first stays.

    Args:
        combinations: k of them.
        errors: (k,).
        costs: By name, (..., k).
    """
    columns = np.concatenate(
        [errors[:, None], *(np.moveaxis(c, -1, 0).reshape(len(errors), -1) for c in costs.values())], 1
    )
    kept, beaten = [], {}
    for row in range(len(combinations)):
        no_worse = (columns <= columns[row]).all(1)
        better = (columns < columns[row]).any(1) | (np.arange(len(columns)) < row)
        by = np.flatnonzero(no_worse & better)
        if row == 0 or not len(by):
            kept.append(row)
        else:
            # Name one that stays: the smallest sum of what was compared beats all that this one beats.
            beaten[row] = int(by[np.argmin(columns[by].sum(1))])
    return kept, beaten


def levels_of(space: SearchSpace, candidates: Sequence[Candidate]) -> NDArray[np.int64]:
    """The candidates as levels, shape (n, n_choices)."""
    return np.array([space.encode(c) for c in candidates], dtype=np.int64).reshape(len(candidates), len(space.choices))


def every_level(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of levels, the last one changing fastest."""
    assert prod(sizes) < 10**7
    return list(product(*(range(size) for size in sizes)))
