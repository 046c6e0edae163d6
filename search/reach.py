"""Whether a budget can be reached at all, before anything is spent on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .errors import UserError
from .integer_program import possible
from .objective import Budget, Objective
from .option_table import OptionTable

_STEPS = 8
# The corners are evaluated, not optimised: a bound a little beyond them may still be met.
_SLACK = 0.9


def check_reach(
    budgets: Sequence[Budget],
    bounds: Sequence[Objective],
    original: Mapping[str, object],
    corners: Sequence[Mapping[str, object]],
) -> None:
    """Compares the bounds on costs with the cheapest corners of the space; accuracy is for the search to find out.

    Args:
        budgets: As the user wrote them.
        bounds: The same, resolved.
        original: The original's metrics.
        corners: Metrics of the original and of the cheapest candidates.

    Raises:
        UserError: a bound is far below everything that is reachable; the range is stated.
    """
    for budget, bound in zip(budgets, bounds, strict=True):
        if bound.goal != "minimize" or bound.bound is None:
            continue
        values = [value for metrics in corners if not math.isnan(value := bound.value(metrics))]
        # Where no corner could be built, the original's value alone says nothing of what is reachable.
        if len(values) > 1 and bound.bound < _SLACK * min(values):
            low, high = min(values), bound.value(original)
            raise UserError(
                f"budget {budget.text!r} is out of reach: {bound.metric} of this model's space goes from "
                f"{low:.4g} to {high:.4g} ({low / high:.3g}x to 1x of the original) and the bound is "
                f"{bound.bound:.4g}; relax the budget, or open more families"
            )


def check_together(
    budgets: Sequence[Budget], bounds: Sequence[Objective], original: Mapping[str, object], table: OptionTable
) -> None:
    """Whether bounds on several costs can be kept by one candidate, as the table of options says.

    Args:
        budgets: As the user wrote them.
        bounds: The same, resolved.
        original: The original's metrics.
        table: Of the search.

    Raises:
        UserError: they cannot, and not nearly; how near the nearest comes is stated.
    """
    zero = np.zeros((1, len(table.space.choices)), dtype=np.int64)
    limits: dict[str, float] = {}
    texts = []
    for budget, bound in zip(budgets, bounds, strict=True):
        value = bound.value(original)
        if bound.goal == "minimize" and bound.bound is not None and bound.metric in table.fixed and value > 0:
            most = bound.bound / value * float(table.cost(bound.metric, zero)[0])
            limits[bound.metric] = min(limits.get(bound.metric, math.inf), most)
            texts.append(budget.text)
    if len(limits) < 2 or possible(table, _times(limits, 1 / _SLACK)):
        return
    low, high = 1 / _SLACK, 1 / _SLACK
    while not possible(table, _times(limits, high)):
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if possible(table, _times(limits, middle)) else (middle, high)
    raise UserError(
        f"the budgets {' and '.join(repr(text) for text in texts)} are out of reach together: what comes nearest has "
        f"{high:.3g} times of each; relax them, or open more families"
    )


def _times(limits: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: factor * limit for name, limit in limits.items()}
