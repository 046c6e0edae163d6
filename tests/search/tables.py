"""Random tables of options, and everything that is in them."""

from __future__ import annotations

import numpy as np

from planish.search.option_table import Array, OptionTable, Site, every_level
from planish.spaces.space import Choice, Kind, SearchSpace


def table_of(seed: int, sites: int, shared: int, *, whole: bool = True, links: int = 2) -> OptionTable:
    """A random table: every site has own choices and hangs on up to `links` shared ones."""
    rng = np.random.default_rng(seed)
    choices = [Choice(f"g{g}", Kind.PRUNE, (None, 0.25, 0.5)[: int(rng.integers(2, 4))]) for g in range(shared)]
    own_of: list[list[int]] = []
    for number in range(sites):
        own_of.append([len(choices), len(choices) + 1])
        choices.append(Choice(f"s{number}", Kind.BLOCK, (None, "separable")))
        choices.append(Choice(f"s{number}", Kind.BITS, (None, 8, 4)[: int(rng.integers(2, 4))]))
    space = SearchSpace(tuple(choices), {})
    errors: tuple[Array, ...] = tuple(
        np.array([0.0, *rng.integers(1, 50, len(choice.options) - 1).astype(float)]) for choice in choices
    )
    built = []
    for number, own in enumerate(own_of):
        linked = tuple(sorted(int(g) for g in rng.choice(shared, min(shared, int(rng.integers(0, links + 1))), False)))
        combinations = every_level([len(choices[place].options) for place in own])
        sizes = [len(choices[place].options) for place in linked]
        costs = {
            name: rng.integers(0, 20, (*sizes, len(combinations))).astype(float) * (1 if whole else 0.37)
            for name in ("time", "size")
        }
        summed = np.array([sum(errors[p][level] for p, level in zip(own, c, strict=True)) for c in combinations])
        built.append(Site(f"s{number}", linked, tuple(own), np.array(combinations), summed, costs))
    return OptionTable(
        space=space,
        shared_errors={g: errors[g] for g in range(shared)},
        shared_costs={"size": {g: rng.integers(0, 9, len(errors[g])).astype(float) for g in range(shared)}},
        sites=tuple(built),
        fixed={"time": 3.0, "size": 5.0},
        option_errors=errors,
        left_out={},
    )


def everything(table: OptionTable) -> tuple[Array, Array, Array]:
    levels = np.array(every_level([len(choice.options) for choice in table.space.choices]))
    return table.error(levels), table.cost("time", levels), table.cost("size", levels)


def table_for(space: SearchSpace, seed: int = 0) -> OptionTable:
    """A table of any space: channels are shared with the next site, and every option costs less than the one before."""
    rng = np.random.default_rng(seed)
    errors: tuple[Array, ...] = tuple(
        np.array([0.0, *np.sort(rng.uniform(0.001, 0.2, len(choice.options) - 1))]) for choice in space.choices
    )
    places = {choice.name: place for place, choice in enumerate(space.choices)}
    names = list(dict.fromkeys(choice.site for choice in space.choices))
    sites = []
    for number, name in enumerate(names):
        near = names[max(0, number - 1) : number + 1]
        shared = tuple(places[f"{other}:prune"] for other in near if f"{other}:prune" in places)
        own = tuple(p for p, c in enumerate(space.choices) if c.site == name and c.kind is not Kind.PRUNE)
        rows = every_level([len(space.choices[place].options) for place in own])
        time = np.array([np.prod([0.8**level for level in row]) for row in rows])
        sizes = [len(space.choices[place].options) for place in shared]
        cost = np.zeros((*sizes, len(rows)))
        for state in every_level(sizes):
            cost[state] = time * np.prod([0.75**level for level in state])
        summed = np.array([sum(errors[p][level] for p, level in zip(own, row, strict=True)) for row in rows])
        combinations = np.array(rows, dtype=np.int64).reshape(len(rows), len(own))
        sites.append(Site(name, shared, own, combinations, summed, {"latency[cpu]": cost, "size": cost * 2}))
    return OptionTable(
        space=space,
        shared_errors={p: errors[p] for p, c in enumerate(space.choices) if c.kind is Kind.PRUNE},
        shared_costs={},
        sites=tuple(sites),
        fixed={"latency[cpu]": 0.1, "size": 0.0},
        option_errors=errors,
        left_out={},
    )
