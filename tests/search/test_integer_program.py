"""The integer program against every candidate of small spaces, and against the dynamic program."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.tables import everything, table_of

from planish.search.dynamic_program import solve
from planish.search.integer_program import best_within, possible
from planish.search.option_table import Array, Site, every_level, levels_of
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


def test_what_could_not_be_fitted_is_not_taken() -> None:
    table = table_of(5, 3, 1)
    place = next(p for p, c in enumerate(table.space.choices) if c.name == "s0:block")
    errors = list(table.option_errors)
    errors[place] = np.array([0.0, *[np.inf] * (len(errors[place]) - 1)])

    def summed(site: Site) -> Array:
        return np.array([sum(errors[p][at] for p, at in zip(site.own, row, strict=True)) for row in site.combinations])

    sites = tuple(replace(site, errors=summed(site)) for site in table.sites)
    broken = replace(table, option_errors=tuple(errors), sites=sites)
    levels = np.array(every_level([len(choice.options) for choice in table.space.choices]))
    whole = broken.error(levels)
    for share in (0.4, 0.6, 0.9):
        limit = share * float(broken.cost("time", levels[:1])[0])
        able = np.isfinite(whole) & (broken.cost("time", levels) <= limit)
        found = best_within(broken, {"time": limit})
        assert (found is not None) == able.any() == possible(broken, {"time": limit})
        if found is not None:
            assert broken.error(levels_of(broken.space, [found]))[0] == pytest.approx(whole[able].min())
