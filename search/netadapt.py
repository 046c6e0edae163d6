"""NetAdapt's greedy walk (Yang et al. 2018): one site at a time gets cheaper, and the most accurate result is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .option_table import OptionTable
from .surrogate import Levels

Key = tuple[int, ...]

# What every step takes off the cost, relative to what is left.
_STEP = 0.08
# Steps so small that no site can make them end the walk.
_SMALLEST = 1e-3


def next_of_walk(
    table: OptionTable, cost: str, accuracy: Mapping[Key, float | None], pending: Sequence[Key]
) -> Key | None:
    """The next candidate of the walk, as levels; None where it has ended.

    Args:
        table: Of the space: which change of a site reaches a step with the least error, as its tables say.
        cost: The cost that is to fall.
        accuracy: What every told candidate came to, None if it failed.
        pending: Proposed and not told yet.
    """
    base: Key = (0,) * len(table.space.choices)
    known = {*accuracy, *pending}
    for _ in range(10_000):
        proposals = _proposals(table, cost, base, 1)
        if not proposals:
            return None
        for proposal in proposals:
            if proposal not in known:
                return proposal
        told = [(value, p) for p in proposals if (value := accuracy.get(p)) is not None]
        if any(p in pending and p not in accuracy for p in proposals):
            # The step is not decided yet: larger steps of the same base come in meanwhile.
            for factor in range(2, 9):
                for proposal in _proposals(table, cost, base, factor):
                    if proposal not in known:
                        return proposal
            return None
        if not told:
            return None
        base = max(told)[1]
    return None


def _proposals(table: OptionTable, cost: str, base: Key, factor: int) -> list[Key]:
    """For every site and shared choice the change that reaches the step with the least error, if any does."""
    now = float(_costs(table, cost, [base])[0])
    most = now - _STEP * factor * (now - table.fixed[cost])
    if now - table.fixed[cost] < _SMALLEST * now:
        return []
    found = []
    for site in table.sites:
        rows = [_with(base, site.own, tuple(int(x) for x in c)) for c in site.combinations]
        found += _cheapest(table, cost, rows, base, most)
    for place in table.shared_errors:
        rows = [_with(base, (place,), (level,)) for level in range(len(table.space.choices[place].options))]
        found += _cheapest(table, cost, rows, base, most)
    return list(dict.fromkeys(found))


def _cheapest(table: OptionTable, cost: str, rows: Sequence[Key], base: Key, most: float) -> list[Key]:
    able = [row for row, c in zip(rows, _costs(table, cost, rows), strict=True) if c <= most and row != base]
    if not able:
        return []
    return [able[int(np.argmin(table.error(_levels(able))))]]


def _costs(table: OptionTable, cost: str, rows: Sequence[Key]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return table.cost(cost, _levels(rows))


def _levels(rows: Sequence[Key]) -> Levels:
    return np.array(rows, dtype=np.int64)


def _with(base: Key, places: Sequence[int], levels: Sequence[int]) -> Key:
    changed = list(base)
    for place, level in zip(places, levels, strict=True):
        changed[place] = level
    return tuple(changed)
