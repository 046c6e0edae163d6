"""Fronts, ranks, crowding and hypervolume against their definitions on small cases with ties and NaN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.search.objective import Objective
from planish.search.pareto import (
    ParetoFront,
    crowding_distance,
    hypervolume,
    non_dominated,
    nondominated_rank,
    relative_losses,
)
from planish.search.trial import State, Trial
from planish.spaces import Candidate

Points = list[tuple[float, ...]]
# Few values make many ties and duplicates.
_VALUE = st.one_of(st.integers(0, 4).map(float), st.just(math.nan))


def _points(values: st.SearchStrategy[float], least: int = 1, most: int = 4) -> st.SearchStrategy[Points]:
    return st.integers(least, most).flatmap(lambda m: st.lists(st.tuples(*[values] * m), min_size=1, max_size=9))


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def _is_marked(points: Points, row: int) -> bool:
    return not any(map(math.isnan, points[row])) and not any(_dominates(other, points[row]) for other in points)


@given(_points(_VALUE))
def test_exactly_the_points_that_none_dominates_are_marked(points: Points) -> None:
    assert non_dominated(points).tolist() == [_is_marked(points, row) for row in range(len(points))]


@pytest.mark.parametrize("count", [1, 999, 1001, 3000])
def test_a_nan_row_is_never_marked_whatever_the_size(count: int) -> None:
    points = np.random.default_rng(0).random((count, 2))
    points[::3, 0] = np.nan
    assert not non_dominated(points)[::3].any()


def test_no_points_give_no_marks() -> None:
    assert non_dominated(np.empty((0, 2))).tolist() == []
    assert nondominated_rank(np.empty((0, 2))).tolist() == []
    assert crowding_distance(np.empty((0, 2))).tolist() == []
    assert hypervolume(np.empty((0, 2)), [1, 1]) == 0


def test_both_duplicates_are_marked() -> None:
    assert non_dominated([[1, 2], [1, 2], [2, 2]]).tolist() == [True, True, False]


@given(_points(_VALUE))
def test_rank_is_the_number_of_fronts_removed_before(points: Points) -> None:
    ranks = nondominated_rank(points)
    left = [row for row in range(len(points)) if not any(map(math.isnan, points[row]))]
    rank = 0
    while left:
        front = [row for row in left if not any(_dominates(points[other], points[row]) for other in left)]
        assert all(ranks[row] == rank for row in front)
        left = [row for row in left if row not in front]
        rank += 1
    assert all(ranks[row] == rank for row in range(len(points)) if any(map(math.isnan, points[row])))


def _cells_dominated(points: Points, reference: int) -> int:
    """Unit cells of the integer grid, each named by its lower corner, that some point dominates."""
    good = [point for point in points if not any(map(math.isnan, point))]
    cells = itertools.product(range(reference), repeat=len(points[0]))
    return sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in good) for cell in cells)


@given(_points(_VALUE))
def test_hypervolume_counts_the_dominated_cells_of_a_grid(points: Points) -> None:
    # Points with a coordinate of 3 or 4 lie on the reference or beyond and dominate no cell below it.
    assert hypervolume(points, [3.0] * len(points[0])) == _cells_dominated(points, 3)


@given(_points(st.floats(0, 1), least=2))
def test_hypervolume_is_the_union_by_inclusion_and_exclusion(points: Points) -> None:
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            total -= (-1) ** size * math.prod(1 - max(column) for column in zip(*subset, strict=True))
    assert hypervolume(points, [1.0] * len(points[0])) == pytest.approx(total, abs=1e-9)  # 2^9 terms of rounding


@given(_points(st.floats(-1, 1), least=2))
def test_hypervolume_does_not_depend_on_the_order(points: Points) -> None:
    shuffled = list(reversed(points))
    reference = [1.0] * len(points[0])
    assert hypervolume(shuffled, reference) == pytest.approx(hypervolume(points, reference), rel=1e-12)


@pytest.mark.parametrize("reference", [[1.0], [1.0, math.inf], [1.0, math.nan], [1.0, 1.0, 1.0]])
def test_a_reference_of_another_shape_or_not_finite_is_refused(reference: list[float]) -> None:
    with pytest.raises(ValueError, match="2 finite numbers"):
        hypervolume([[0, 0]], reference)


def test_crowding_is_the_normalised_gap_to_both_neighbours() -> None:
    points = [[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0], [math.nan, 2.0]]
    # Inner gaps: (3 - 0) / 4 on either axis, and (4 - 1) / 4.
    assert crowding_distance(points).tolist() == [math.inf, 1.5, 1.5, math.inf, 0.0]


def test_crowding_of_equal_points_is_zero() -> None:
    assert crowding_distance([[1, 1], [1, 1], [1, 1]]).tolist() == [0, 0, 0]


OBJECTIVES = (Objective("accuracy", "maximize"), Objective("size", "minimize"))


def _trial(number: int, accuracy: float | None, size: float | None) -> Trial:
    metrics = {"accuracy": accuracy, "size_bytes": size}
    return Trial(number, Candidate({"a": number}), State.COMPLETE, metrics, None, 0)


def test_front_orders_its_members_by_accuracy_and_drops_unknown_metrics() -> None:
    trials = (_trial(0, 0.9, 100), _trial(1, 0.8, 50), _trial(2, 0.7, 60), _trial(3, None, 1), _trial(4, 0.95, 200))
    assert [trial.number for trial in ParetoFront(OBJECTIVES, trials).members()] == [4, 0, 1]


def test_hypervolume_of_a_front_is_relative_to_the_original() -> None:
    original = _trial(0, 0.9, 100)
    front = ParetoFront(OBJECTIVES, (original, _trial(1, 0.8, 25)))
    # The original is not cheaper than itself: 0.8 of accuracy times 3/4 of the size.
    assert front.hypervolume(original.metrics) == pytest.approx(0.6, rel=1e-12)


def test_relative_losses_are_nan_where_the_original_has_no_cost() -> None:
    losses = relative_losses(OBJECTIVES, [{"accuracy": 0.5, "size_bytes": 3}], {"accuracy": 0.9})
    assert losses[0, 0] == 0.5
    assert math.isnan(losses[0, 1])
