"""Budgets that nothing keeps together, against every candidate of a small table."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from tests.search.tables import everything, table_of

from planish.search import controller
from planish.search.errors import UserError
from planish.search.objective import Budget, Objective, parse_budget
from planish.search.option_table import OptionTable
from planish.search.reach import check_reach, check_together
from planish.spaces import Candidate, Choice, Kind, SearchSpace

if TYPE_CHECKING:
    from planish.search.workers import Pool

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


class _Run:
    """A search up to its corners, on a device where 4 bits take a tenth of the original's time or twice all of it."""

    def __init__(self, budget: str, slow_bytes: bool, asked: bool = False) -> None:
        self.found = object.__new__(controller._Search)
        self.records: dict[int, Any] = {}
        self.written: list[bool] = []
        start = SimpleNamespace(trial=SimpleNamespace(candidate=None, batch=0))
        self.records[0] = start
        if asked:
            self.records[9] = SimpleNamespace(trial=SimpleNamespace(candidate=None, batch=1))
        budgets = parse_budget(budget, ("cpu",))
        self.slow_bytes = slow_bytes
        keys: dict[str, Any] = {
            "space": SearchSpace((Choice("a", Kind.BITS, (None, 4)), Choice("a", Kind.PRUNE, (None, 0.5))), {}),
            "evaluator": SimpleNamespace(simplified=lambda candidate: candidate),
            "spec": SimpleNamespace(budgets=lambda: budgets),
            "ledger": SimpleNamespace(
                records=self.records, original=ORIGINAL, bounds=lambda: [b.resolve(ORIGINAL) for b in budgets],
                metrics=self.metrics, start=self.start,
            ),
            "steps": SimpleNamespace(score=lambda pool, numbers: None),
            "front": SimpleNamespace(write=lambda: self.written.append(True)),
            "_begin": lambda *given, **keys: None,
        }  # fmt: skip
        for name, value in keys.items():
            setattr(self.found, name, value)

    def start(self, number: int, candidate: Candidate, batch: int) -> None:
        self.records.setdefault(number, SimpleNamespace(trial=SimpleNamespace(candidate=candidate, batch=batch)))

    def metrics(self, number: int) -> dict[str, Any]:
        if number == 0:
            return ORIGINAL
        options = self.records[number].trial.candidate.options
        bits = (2.0 if self.slow_bytes else 0.1) if options["a:bits"] else 1.0
        time = 2e-3 * bits * (0.5 if options["a:prune"] else 1.0)
        return {"latency_s": {"cpu": {"value": time}}, "size_bytes": 1000.0}

    def reach(self) -> int:
        return self.found._reach(cast("Pool", None))


def test_where_bytes_are_slow_floats_say_what_can_be_reached() -> None:
    assert _Run("latency<=0.2x", slow_bytes=False).reach() == 1
    slow = _Run("latency<=0.6x", slow_bytes=True)
    assert slow.reach() == 2
    assert [record.trial.candidate.options["a:bits"] for n, record in slow.records.items() if n] == [4, None]
    refused = _Run("latency<=0.3x", slow_bytes=True)
    with pytest.raises(UserError, match=r"out of reach: .* \(0.5x to 1x of the original\)"):
        refused.reach()
    assert refused.written
    # An earlier session went on: what it found is not decided again, and its corners are counted.
    later = _Run("latency<=0.3x", slow_bytes=True, asked=True)
    assert later.reach() == 1
