"""Why a candidate leaves a site as it is, which has options: what the best of them would save, and spoil."""

from __future__ import annotations

import numpy as np

from ..spaces.space import Candidate
from .objective import split_metric
from .option_table import OptionTable, levels_of

LEFT_ALONE = "left_alone.json"


def left_alone(table: OptionTable, candidate: Candidate, cost: str) -> dict[str, str]:
    """By site whose choices are all left as they are, the reason, in the words of the table that was searched by.

    Args:
        table: Of options.
        candidate: Of its space.
        cost: What was to become less, for instance `latency[cpu]`.
    """
    space = table.space
    own = levels_of(space, [candidate])[0]
    sites: dict[str, list[int]] = {}
    for place, choice in enumerate(space.choices):
        sites.setdefault(choice.site, []).append(place)
    alone = {site: places for site, places in sites.items() if not own[places].any()}
    tried = [(site, p, k) for site, ps in alone.items() for p in ps for k in range(1, len(space.choices[p].options))]
    levels = np.tile(own, (1 + len(tried), 1))
    for row, (_, place, level) in enumerate(tried, start=1):
        levels[row, place] = level
    costs, errors = table.cost(cost, levels), table.error(levels)
    saved, spoilt = 1 - costs[1:] / costs[0], errors[1:] - errors[0]
    name = split_metric(cost)[0]
    reasons = {}
    for site in alone:
        rows = [row for row, (where, _, _) in enumerate(tried) if where == site]
        paying = [row for row in rows if saved[row] > 0 and np.isfinite(spoilt[row])]
        if not paying:
            reasons[site] = f"none of its options would lower the {name} of this model"
            continue
        best = max(paying, key=lambda row: saved[row] / max(spoilt[row], 1e-12))
        _, place, level = tried[best]
        choice = space.choices[place]
        reasons[site] = (
            f"{choice.kind.value} {choice.options[level]}, its best option, would lower the {name} by "
            f"{saved[best]:.1%} and add {spoilt[best]:.2g} to the error, of {errors[0]:.2g} by now"
        )
    return reasons
