"""Who goes on to a rung of distillation."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from numpy.typing import NDArray

from .front import cheaper
from .ledger import Ledger
from .objective import Objective, number
from .pareto import Array, crowding_distance, nondominated_rank
from .refine import left
from .replay import Metrics

# Latency bins in which candidates compete: the fast end is never starved by the accurate one.
_BINS = 4
# As much more than expected may be lost by those who get the last places: there is no later choice.
_MARGIN = 1.5
# A cost that was measured may turn out to be so much less: no training makes it less.
_NEARLY = 1.05


def promoted(
    ledger: Ledger,
    alive: Sequence[int],
    count: int,
    rung: int,
    guess: float = 0.0,
    *,
    last: bool = False,
    hopeless: Container[int] = (),
) -> list[int]:
    """Which of the trials enter a rung; those who keep the budgets on cost go before those who do not.

    Those whom the training that is left is expected to bring to a budget on accuracy go before the others: once they
    were trained, by what they have lost and how much of it more epochs leave (`refine.left`), before by the errors of
    their options. Of the others the most accurate of every bin go on, which are the nearest to it; to the first rung
    and the last the most accurate of all. A pure function of what was recorded before the rung.

    Args:
        ledger: Of the run.
        alive: Trials that got so far.
        count: How many, at most.
        rung: 0 is the first.
        guess: The accuracy of always naming the most frequent class. What was trained, cannot be told from that, and is
            nearer to it than to the original is left behind, small and fast as it may be, unless it keeps a budget on
            accuracy or there is nothing else.
        last: Whether what enters is trained to the end.
        hopeless: The trials that training is not expected to bring to the budget on accuracy.
    """
    if not alive:
        return []
    base, objectives = ledger.original, ledger.objectives
    rows = [ledger.records[number].before(rung) for number in alive]
    losses = np.array([[o.loss(o.value(row)) for o in objectives] for row in rows])
    costs = [o for o in objectives if o.goal == "minimize"]
    # Bins are of latency, where that is traded off: the worst device's, relative to the original.
    binned = [o for o in costs if o.metric.startswith("latency[")] or costs
    cost = np.array([max((o.ratio(row, base) for o in binned), default=0.0) for row in rows])

    epochs = ledger.spec.distill.rungs
    still_lost = min(1.0, left(epochs[-1]) / left(epochs[rung - 1]) * (_MARGIN if last else 1.0)) if rung else 1.0

    def expected(bound: Objective, row: Metrics) -> float:
        """What a metric that has to rise will be at the end, as far as it is below the original's now."""
        value, whole = bound.value(row), bound.value(base)
        return value if bound.goal == "minimize" or not value < whole else whole - still_lost * (whole - value)

    def keeping(goal: str) -> NDArray[np.bool_]:
        bounds = [b for b in ledger.bounds() if b.goal == goal]
        return np.array([all(b.allows(expected(b, row)) for b in bounds) for row in rows], dtype=bool)

    # What can never be offered does not take a place.
    losses[np.array([not cheaper(objectives, row, base) for row in rows], dtype=bool)] = np.nan
    cheap = keeping("minimize")
    limits = [b for b in ledger.bounds() if b.goal == "minimize"]
    nearly = np.array([all(b.allows(b.value(row) / _NEARLY) for b in limits) for row in rows], dtype=bool)
    accurate = keeping("maximize")
    if not rung:
        # What keeps it as it is has nothing to hope for.
        accurate |= np.array([number not in hopeless for number in alive], dtype=bool)
    if rung:
        bounds = [b for b in ledger.bounds() if b.goal == "maximize"]
        kept = np.array([bool(bounds) and all(b.allows(b.value(row)) for b in bounds) for row in rows], dtype=bool)
        guessing = np.array([_guesses(row, base, guess) for row in rows], dtype=bool) & ~kept
        losses[guessing] = losses[guessing] if guessing.all() else np.nan
    chosen: list[int] = []
    # What is far above a budget on cost can never be offered: it is trained only where there is nothing else.
    for group in (cheap & accurate, cheap & ~accurate, nearly & ~cheap, ~nearly):
        if chosen and not (group & nearly).any():
            continue
        # Below a budget on accuracy only accuracy counts.
        below = bool((group & ~accurate).any())
        own = losses[:, [o.goal == "maximize" for o in objectives]] if below else losses
        bins = 1 if below and (last or not rung) else _BINS
        chosen += promote(np.where(group[:, None], own, np.nan), cost, count - len(chosen), bins)
    return sorted(alive[row] for row in chosen)


def _guesses(metrics: Metrics, original: Metrics, guess: float) -> bool:
    """Whether an accuracy may be that of guessing, by its 95 % interval, and is nearer to it than to the original's."""
    interval = metrics.get("accuracy_ci95")
    lowest = number(interval[0]) if isinstance(interval, (list, tuple)) and interval else 1.0
    value = number(metrics.get("accuracy"))
    return lowest <= guess and not value - guess >= number(original.get("accuracy")) - value


def promote(losses: Array, cost: Array, count: int, bins: int = _BINS) -> list[int]:
    """The rows that go on, at most `count`: by nondominated rank and crowding distance inside bins of cost.

    Args:
        losses: Shape (n, m), less is better; a row with a NaN is never promoted.
        cost: Shape (n,), what the bins are made of (latency, relative to the original). Bins hold equally many.
        count: How many.
        bins: Of cost.

    Returns:
        Row numbers in ascending order.
    """
    able = np.flatnonzero(~np.isnan(losses).any(axis=1) & ~np.isnan(cost))
    if count <= 0:
        return []
    if len(able) <= count:
        return [int(row) for row in able]
    ranks, crowding = nondominated_rank(losses[able]), crowding_distance(losses[able])
    by_cost = able[np.argsort(cost[able], kind="stable")]
    groups = np.array_split(by_cost, min(bins, count))
    position = {int(row): place for place, row in enumerate(able)}
    queues = [
        sorted((int(row) for row in members), key=lambda row: (ranks[position[row]], -crowding[position[row]], row))
        for members in groups
    ]
    chosen: list[int] = []
    while len(chosen) < count:
        # In turns, the fastest bin first: where the count does not divide, the fast end gets one more.
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return sorted(chosen)
