"""Why a candidate leaves sites alone, against the table counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tests.search.tables import table_of

from planish.search.left_alone import left_alone


@pytest.mark.parametrize("seed", range(8))
def test_every_site_that_is_left_alone_says_what_its_best_option_would_do(seed: int) -> None:
    table = table_of(seed, 4, 2)
    rng = np.random.default_rng(seed)
    levels = np.array([int(rng.integers(len(c.options))) * int(rng.integers(2)) for c in table.space.choices])
    found = left_alone(table, table.space.decode(levels.tolist()), "time")
    sites: dict[str, list[int]] = {}
    for place, choice in enumerate(table.space.choices):
        sites.setdefault(choice.site, []).append(place)
    assert set(found) == {site for site, places in sites.items() if not levels[places].any()}
    [base], [error] = table.cost("time", levels[None]), table.error(levels[None])
    for site, reason in found.items():
        ratios = {}
        for place in sites[site]:
            for level in range(1, len(table.space.choices[place].options)):
                other = levels.copy()
                other[place] = level
                saved = 1 - float(table.cost("time", other[None])[0]) / base
                added = float(table.error(other[None])[0]) - error
                if saved > 0:
                    option = f"{table.space.choices[place].kind.value} {table.space.choices[place].options[level]}"
                    ratios[option] = (saved / added, saved)
        if not ratios:
            assert reason == "none of its options would lower the time of this model"
            continue
        name = reason.partition(", its best option")[0]
        assert ratios[name][0] == pytest.approx(max(ratio for ratio, _ in ratios.values()))
        assert f"by {ratios[name][1]:.1%} and" in reason
