"""Whether a budget can be reached at all, before anything is spent on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .errors import UserError
from .objective import Budget, Objective

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
        if values and bound.bound < _SLACK * min(values):
            low, high = min(values), bound.value(original)
            raise UserError(
                f"budget {budget.text!r} is out of reach: {bound.metric} of this model's space goes from "
                f"{low:.4g} to {high:.4g} ({low / high:.3g}x to 1x of the original) and the bound is "
                f"{bound.bound:.4g}; relax the budget, or open more families"
            )
