"""The integer program against every candidate of small spaces, and against the dynamic program."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.tables import everything, table_of

from planish.search.dynamic_program import solve
from planish.search.integer_program import best_within, possible
from planish.search.option_table import every_level, levels_of
from planish.spaces.space import Candidate


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), tight=st.floats(0.0, 1.0), tight_size=st.floats(0.0, 1.0))
def test_the_least_error_under_two_limits(seed: int, tight: float, tight_size: float) -> None:
    table = table_of(seed, 2, 2)
    errors, time, size = everything(table)
    limits = {"time": float(np.quantile(time, tight)), "size": float(np.quantile(size, tight_size))}
    fitting = errors[(time <= limits["time"]) & (size <= limits["size"])]
    found = best_within(table, limits)
    assert possible(table, limits) == bool(len(fitting))
    if not len(fitting):
        assert found is None
        return
    assert found is not None
    levels = levels_of(table.space, [found])
    assert table.cost("time", levels)[0] <= limits["time"]
    assert table.cost("size", levels)[0] <= limits["size"]
    assert abs(table.error(levels)[0] - fitting.min()) < 1e-6


def test_a_pool_is_the_best_that_differ_enough() -> None:
    table = table_of(11, 2, 2)
    levels = np.array(every_level([len(choice.options) for choice in table.space.choices]))
    errors, time, _ = everything(table)
    limit = float(np.median(time))
    pool: list[Candidate] = []
    for _ in range(4):
        found = best_within(table, {"time": limit}, apart=pool, distance=2)
        assert found is not None
        own = levels_of(table.space, [found])[0]
        allowed = time <= limit
        for other in levels_of(table.space, pool):
            assert (own != other).sum() >= 2
            allowed &= (levels != other).sum(1) >= 2
        assert abs(table.error(own[None])[0] - errors[allowed].min()) < 1e-6
        pool.append(found)


def test_it_agrees_with_the_dynamic_program_on_a_larger_space() -> None:
    table = table_of(21, 6, 3)
    zero = np.zeros((1, len(table.space.choices)), dtype=np.int64)
    most = float(table.cost("time", zero)[0])
    found = solve(table, "time", buckets=int(most - 3), most=most)
    for budget in np.linspace(found.least(), most, 4).round():
        one, two = found.best(budget), best_within(table, {"time": budget})
        assert one is not None
        assert two is not None
        errors = table.error(levels_of(table.space, [one, two]))
        assert abs(errors[0] - errors[1]) < 1e-6
