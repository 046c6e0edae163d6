"""The dynamic program against every candidate of small spaces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.tables import everything, table_of

from planish.search.dynamic_program import TooDense, solve
from planish.search.option_table import OptionTable, Site, every_level, levels_of, undominated
from planish.spaces.space import Choice, Kind, SearchSpace


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), sites=st.integers(1, 3), shared=st.integers(0, 3))
def test_every_budget_has_the_least_error_of_all_candidates(seed: int, sites: int, shared: int) -> None:
    table = table_of(seed, sites, shared)
    errors, time, _ = everything(table)
    most = float(time.max())
    # Whole costs and a bucket a unit: nothing is rounded.
    found = solve(table, "time", buckets=max(1, int(most - 3)), most=max(most, 4.0))
    for budget in range(3, int(most) + 1):
        fitting = errors[time <= budget]
        best = found.best(float(budget))
        if not len(fitting):
            assert best is None
            continue
        assert best is not None
        levels = levels_of(table.space, [best])
        assert table.cost("time", levels)[0] <= budget
        assert table.error(levels)[0] == fitting.min()
    assert found.least() == time.min()


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.0, 5.0))
def test_a_penalty_trades_errors_for_another_cost(seed: int, weight: float) -> None:
    table = table_of(seed, 2, 2)
    errors, time, size = everything(table)
    most = max(float(time.max()), 4.0)
    found = solve(table, "time", buckets=int(most - 3), most=most, penalties={"size": weight})
    for budget in np.unique(time):
        best = found.best(float(budget))
        assert best is not None
        levels = levels_of(table.space, [best])
        got = table.error(levels)[0] + weight * table.cost("size", levels)[0]
        assert got == pytest.approx((errors + weight * size)[time <= budget].min())


def test_factors_change_which_errors_count() -> None:
    table = table_of(5, 2, 1)
    rng = np.random.default_rng(0)
    factors = tuple(rng.uniform(0.1, 3, len(e)) for e in table.option_errors)
    levels = np.array(every_level([len(choice.options) for choice in table.space.choices]))
    errors = sum((table.option_errors[p] * factors[p])[levels[:, p]] for p in range(len(table.option_errors)))
    time = table.cost("time", levels)
    most = float(time.max())
    found = solve(table, "time", buckets=int(most - 3), most=most, factors=factors)
    budget = float(np.median(time))
    best = found.best(np.floor(budget))
    assert best is not None
    own = levels_of(table.space, [best])[0]
    got = sum(table.option_errors[p][own[p]] * factors[p][own[p]] for p in range(len(own)))
    assert got == pytest.approx(np.asarray(errors)[time <= np.floor(budget)].min())


def test_rounded_costs_stay_near_the_budget() -> None:
    table = table_of(3, 3, 2, whole=False)
    _, time, _ = everything(table)
    found = solve(table, "time", buckets=1000, most=float(time.max()))
    for budget in np.linspace(time.min(), time.max(), 7):
        best = found.best(float(budget) + 3 * found.unit)
        assert best is not None
        # Half a bucket for each of the sites, and what was added to the budget.
        assert table.cost("time", levels_of(table.space, [best]))[0] <= budget + 5 * found.unit


def test_channels_that_are_all_coupled_are_refused_with_their_names() -> None:
    table = table_of(0, 2, 13)
    sizes = [len(table.space.choices[g].options) for g in range(13)]
    costs = {name: np.broadcast_to(0.0, (*sizes, 1)) for name in ("time", "size")}
    dense = Site("all", tuple(range(13)), (), np.zeros((1, 0), np.int64), np.zeros(1), costs)
    bigger = OptionTable(
        table.space, table.shared_errors, {}, (*table.sites, dense), table.fixed, table.option_errors, {}
    )
    with pytest.raises(TooDense, match="g0, g1"):
        solve(bigger, "time")


def test_what_another_combination_beats_is_left_out_and_named() -> None:
    errors = np.array([0.0, 1.0, 2.0, 1.0])
    costs = {"time": np.array([[9.0, 5.0, 6.0, 5.0], [9.0, 4.0, 4.0, 4.0]])}
    kept, beaten = undominated([(0,), (1,), (2,), (3,)], errors, costs)
    assert kept == [0, 1]
    assert beaten == {2: 1, 3: 1}


def test_sites_that_are_all_rounded_up_leave_something_that_fits() -> None:
    """52 layers of 7.69 buckets each, of 400: rounded to 8, not even the original would fit."""
    choices = tuple(Choice(f"s{number}", Kind.BITS, (None, 8)) for number in range(52))
    rows, errors = np.array([[0], [1]]), np.array([0.0, 1.0])
    sites = tuple(
        Site(choice.site, (), (place,), rows, errors, {"time": np.array([1.0, 0.995])})
        for place, choice in enumerate(choices)
    )
    table = OptionTable(SearchSpace(choices, {}), {}, {}, sites, {"time": 0.0}, (errors,) * 52, {})
    found = solve(table, "time", buckets=400)
    assert found.least() == pytest.approx(52, rel=0.05)
    assert found.best(found.least()) == table.space.original()
    assert solve(table, "time", buckets=400, most=30.0).least() == np.inf
