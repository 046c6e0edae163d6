"""Budgets that nothing keeps together, against every candidate of a small table."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tests.search.tables import everything, table_of

from planish.search.errors import UserError
from planish.search.objective import Budget, Objective, parse_budget
from planish.search.option_table import OptionTable
from planish.search.reach import check_reach, check_together

ORIGINAL = {"latency_s": {"cpu": {"value": 2e-3}}, "size_bytes": 5000.0}


def bounds_of(time: float, size: float) -> tuple[list[Budget], list[Objective]]:
    """Ratios to the original, by the names of the tables' costs."""
    budgets = [*parse_budget(f"latency<={time}x", ("cpu",)), *parse_budget(f"size<={size}x", ("cpu",))]
    return budgets, [budget.resolve(ORIGINAL) for budget in budgets]


def timed(table: OptionTable) -> OptionTable:
    """The table with its time as a device's latency."""
    sites = tuple(
        replace(site, costs={"latency[cpu]": site.costs["time"], "size": site.costs["size"]}) for site in table.sites
    )
    return replace(table, sites=sites, fixed={"latency[cpu]": table.fixed["time"], "size": table.fixed["size"]})


@pytest.mark.parametrize("seed", range(6))
def test_together_out_of_reach_names_how_near_the_nearest_comes(seed: int) -> None:
    plain = table_of(seed, 3, 2)
    table = timed(plain)
    _, time, size = everything(plain)
    # In shares of the original, the first of all candidates.
    time, size = time / time[0], size / size[0]
    for share in (0.3, 0.5, 0.7, 0.9):
        wanted = (share * float(time.min()) + (1 - share), share * float(size.min()) + (1 - share))
        nearest = float(np.maximum(time / wanted[0], size / wanted[1]).min())
        budgets, bounds = bounds_of(*wanted)
        if nearest < 1 / 0.9 - 1e-3:
            check_together(budgets, bounds, ORIGINAL, table)
        elif nearest > 1 / 0.9 + 1e-3:
            with pytest.raises(UserError, match=r"out of reach together: what comes nearest has .* times of each") as e:
                check_together(budgets, bounds, ORIGINAL, table)
            told = re.search(r"nearest has ([\d.]+) times", str(e.value))
            assert told is not None
            assert float(told.group(1)) == pytest.approx(nearest, rel=0.01)


def test_one_budget_alone_is_not_its_business() -> None:
    table = timed(table_of(1, 3, 2))
    budgets, bounds = bounds_of(1e-6, 1e-6)
    check_together(budgets[:1], bounds[:1], ORIGINAL, table)


def test_where_no_corner_was_built_nothing_is_refused() -> None:
    budgets, bounds = bounds_of(0.1, 0.1)
    check_reach(budgets, bounds, ORIGINAL, [ORIGINAL, {}])
    corner = {"latency_s": {"cpu": {"value": 1e-3}}, "size_bytes": 400.0}
    with pytest.raises(UserError, match=r"'latency<=0.1x' is out of reach: .* \(0.5x to 1x of the original\)"):
        check_reach(budgets, bounds, ORIGINAL, [ORIGINAL, corner])
