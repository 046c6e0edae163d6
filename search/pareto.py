"""Pareto fronts: which points no other beats, how far apart they are, and how much they dominate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .objective import Objective
from .trial import Trial

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ParetoFront:
    """The trials that no other trial beats in all objectives; whether a trial may compete is the caller's to say."""

    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]

    def losses(self) -> Array:
        """Less is better, shape (n_trials, n_objectives); NaN where a trial lacks the metric."""
        rows = [[o.loss(o.value(trial.metrics)) for o in self.objectives] for trial in self.trials]
        return np.array(rows, dtype=np.float64).reshape(len(self.trials), len(self.objectives))

    def members(self) -> tuple[Trial, ...]:
        """The front in the order of its first objective's loss, then of the others', then of the numbers."""
        losses = self.losses()
        marked = np.flatnonzero(non_dominated(losses))
        order = sorted(marked, key=lambda row: (*losses[row].tolist(), self.trials[row].number))
        return tuple(self.trials[row] for row in order)

    def hypervolume(self, original: Mapping[str, object]) -> float:
        """The share of the unit box that the trials dominate, see `relative_losses`."""
        losses = relative_losses(self.objectives, [trial.metrics for trial in self.trials], original)
        return hypervolume(losses, np.ones(len(self.objectives)))


def relative_losses(
    objectives: Sequence[Objective], metrics: Sequence[Mapping[str, object]], original: Mapping[str, object]
) -> Array:
    """Losses on scales from 0 (ideal) to 1, shape (n, n_objectives): 1 - accuracy, and cost / the original's cost.

    With the reference (1, ..., 1) only what is cheaper than the original in every cost counts.
    """
    rows = [
        [1 - o.value(entry) if o.goal == "maximize" else o.ratio(entry, original) for o in objectives]
        for entry in metrics
    ]
    return np.array(rows, dtype=np.float64).reshape(len(metrics), len(objectives))


def non_dominated(losses: ArrayLike) -> NDArray[np.bool_]:
    """Marks the points that no other point beats; equal points do not beat each other.

    Args:
        losses: Shape (n, m), less is better. A row with a NaN is marked False and beats nothing.
    """
    points = _matrix(losses)
    marked: NDArray[np.bool_] = np.array(~np.isnan(points).any(axis=1))
    for row in np.flatnonzero(marked):
        # A comparison with NaN is false, so rows with a NaN never beat this one.
        beats = (points <= points[row]).all(axis=1) & (points < points[row]).any(axis=1)
        marked[row] = not beats.any()
    return marked


def nondominated_rank(losses: ArrayLike, enough: int | None = None) -> NDArray[np.int64]:
    """The front every point is on, shape (n,): 0 for the best, 1 once those are removed, ... (Srinivas and Deb 1994).

    Rows with a NaN come last, on a front of their own; so does whatever is left once `enough` points have a front.
    """
    points = _matrix(losses)
    ranks = np.full(len(points), -1, dtype=np.int64)
    remaining = np.flatnonzero(~np.isnan(points).any(axis=1))
    rank = 0
    while len(remaining) and (enough is None or len(points) - len(remaining) < enough):
        marked = non_dominated(points[remaining])
        ranks[remaining[marked]] = rank
        remaining = remaining[~marked]
        rank += 1
    ranks[ranks < 0] = rank
    return ranks


def crowding_distance(losses: ArrayLike) -> Array:
    """How alone every point is among the points given, shape (n,); more is lonelier (Deb et al. 2002, NSGA-II).

    The points at either end of an objective are infinitely alone. Rows with a NaN get 0.
    """
    points = _matrix(losses)
    distance = np.zeros(len(points))
    valid = np.flatnonzero(~np.isnan(points).any(axis=1))
    for column in points[valid].T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        if len(ordered) == 0 or ordered[0] == ordered[-1]:
            continue
        gaps = (ordered[2:] - ordered[:-2]) / (ordered[-1] - ordered[0])
        distance[valid[order[1:-1]]] += gaps
        distance[valid[order[[0, -1]]]] = np.inf
    return distance


def hypervolume(losses: ArrayLike, reference: ArrayLike) -> float:
    """The exact volume that the points dominate below the reference.

    By exclusive volumes, WFG (While, Bradstreet and Barone 2012), down to a sweep in two dimensions.

    Args:
        losses: Shape (n, m), less is better. Rows with a NaN, or at or beyond the reference in any column, add nothing.
        reference: Shape (m,), finite.

    Raises:
        ValueError: the shapes differ or the reference is not finite.
    """
    points, corner = _matrix(losses), np.asarray(reference, dtype=np.float64)
    if corner.shape != (points.shape[1],) or not np.isfinite(corner).all():
        raise ValueError(f"the reference {corner.tolist()} must be {points.shape[1]} finite numbers")
    inside = points[(points < corner).all(axis=1)]
    return _volume(inside, corner)


def _volume(points: Array, corner: Array) -> float:
    """Of points strictly below the corner."""
    if len(points) == 0:
        return 0.0
    front = np.unique(points[non_dominated(points)], axis=0)
    if front.shape[1] == 1:
        return float(corner[0] - front[0, 0])
    if front.shape[1] == 2:
        # np.unique sorted by the first column, so the second falls from row to row.
        heights = np.concatenate([corner[1:], front[:-1, 1]]) - front[:, 1]
        return float(((corner[0] - front[:, 0]) * heights).sum())
    # Worst last coordinate first: the points after a row all lie at or below it there, so the volume that only
    # this row dominates is a slab: its depth to the corner times a volume of one dimension less.
    front = front[np.argsort(-front[:, -1], kind="stable")]
    total = 0.0
    for row, point in enumerate(front):
        others = np.maximum(front[row + 1 :, :-1], point[:-1])
        area = float(np.prod(corner[:-1] - point[:-1])) - _volume(others, corner[:-1])
        total += area * float(corner[-1] - point[-1])
    return total


def _matrix(losses: ArrayLike) -> Array:
    points = np.asarray(losses, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"losses have the shape {points.shape}; it must be (n_points, n_objectives)")
    return points
