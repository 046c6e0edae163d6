"""The candidate with the least summed error under several limits at once, and others that differ from it: exact.

One binary variable for every combination of a site and every state of the choices that it shares, tied to the shared
choices' own variables; scipy's HiGHS does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces.space import Candidate
from .option_table import Array, OptionTable, every_level, levels_of

# After which the best that was found counts: not seconds, by which a busy machine would propose something else.
_NODES = 2000
# Only so that a program which nothing here can solve does not hold up a search.
_SECONDS = 300.0
# What scipy's `milp` calls a program that nothing keeps.
_INFEASIBLE = 2


def best_within(
    table: OptionTable,
    limits: Mapping[str, float],
    *,
    apart: Sequence[Candidate] = (),
    distance: int = 1,
    factors: tuple[Array, ...] | None = None,
    nodes: int = _NODES,
) -> Candidate | None:
    """The candidate of least error that keeps every limit; None if there is none.

    Args:
        table: Of the space.
        limits: The most of every named cost.
        apart: Candidates from which it must differ in at least `distance` choices (Hamming cuts).
        distance: See there.
        factors: For every option of every choice, its error is multiplied by it.
        nodes: Of the branch-and-bound tree, after which the best that was found counts.
    """
    program = _within(table, limits, factors)
    for row in levels_of(table.space, list(apart)):
        same = [program.option[place, int(level)] for place, level in enumerate(row)]
        program.at_most(_sum(same), len(same) - distance)
    objective = np.zeros(program.count)
    for column, value in program.objective.items():
        objective[column] += value
    result = _solved(program, objective, nodes)
    if result.x is None:
        return None
    levels = np.zeros(len(table.space.choices), dtype=np.int64)
    for place, choice in enumerate(table.space.choices):
        values = [
            sum(float(result.x[column]) * weight for column, weight in program.option[place, level].items())
            for level in range(len(choice.options))
        ]
        levels[place] = int(np.argmax(values))
    return table.space.decode(levels)


def possible(table: OptionTable, limits: Mapping[str, float], nodes: int = _NODES) -> bool:
    """Whether anything keeps every limit, whatever its error; True where that was not settled in so many nodes."""
    program = _within(table, limits, None)
    return int(_solved(program, np.zeros(program.count), nodes).status) != _INFEASIBLE


def _within(table: OptionTable, limits: Mapping[str, float], factors: tuple[Array, ...] | None) -> _Program:
    program = _Program(table, factors)
    for name, limit in limits.items():
        # In parts of the limit: the solver takes what exceeds a bound by a millionth for kept, and seconds are few.
        unit = abs(limit) or 1.0
        row = {column: value / unit for column, value in program.costs[name].items()}
        program.at_most(row, (limit - table.fixed[name]) / unit)
    return program


def _solved(program: _Program, objective: NDArray[np.float64], nodes: int) -> Any:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    entries = [(r, column, value) for r, row in enumerate(program.rows) for column, value in row.items()]
    matrix = csr_matrix(
        ([e[2] for e in entries], ([e[0] for e in entries], [e[1] for e in entries])),
        shape=(len(program.rows), program.count),
    )
    return milp(
        objective,
        integrality=np.ones(program.count),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, program.low, program.high),
        options={"node_limit": nodes, "time_limit": _SECONDS},
    )


_Row = dict[int, float]


class _Program:
    """The variables and constraints of a table.

    Attributes:
        option: For every (choice, level), the variables whose sum says whether it is taken.
        objective: The summed errors.
        costs: By name, without what is fixed.
    """

    def __init__(self, table: OptionTable, factors: tuple[Array, ...] | None) -> None:
        self.count = 0
        self.rows: list[_Row] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.option: dict[tuple[int, int], _Row] = {}
        self.objective: _Row = {}
        self.costs: dict[str, _Row] = {name: {} for name in table.fixed}
        weights = [np.ones(len(e)) for e in table.option_errors] if factors is None else factors
        shared = {place for site in table.sites for place in site.shared} | set(table.shared_errors)
        for place in sorted(shared):
            self._shared(table, place, weights[place])
        for site in table.sites:
            errors = site.errors
            if factors is not None:
                errors = sum(
                    (
                        (table.option_errors[place] * weights[place])[site.combinations[:, column]]
                        for column, place in enumerate(site.own)
                    ),
                    np.zeros(len(site.errors)),
                )
            sizes = [len(table.space.choices[place].options) for place in site.shared]
            variables: dict[tuple[tuple[int, ...], int], int] = {}
            for state in every_level(sizes):
                for row in range(len(errors)):
                    column = variables[state, row] = self._variable()
                    self._spoils(column, float(errors[row]))
                    for name, costs in site.costs.items():
                        self.costs[name][column] = float(costs[state][row])
            self._tie(site.shared, sizes, variables)
            self._own(table, site.own, site.combinations, variables)

    def at_most(self, row: _Row, limit: float) -> None:
        """The sum of a row must not be more than a limit."""
        self._constrain(row, -np.inf, limit)

    def _shared(self, table: OptionTable, place: int, factors: Array) -> None:
        levels = len(table.space.choices[place].options)
        errors = table.shared_errors.get(place, np.zeros(levels)) * factors
        columns = [self._variable() for _ in range(levels)]
        for level, column in enumerate(columns):
            self.option[place, level] = {column: 1.0}
            self._spoils(column, float(errors[level]))
            for name, by_place in table.shared_costs.items():
                if place in by_place:
                    self.costs[name][column] = float(by_place[place][level])
        self._constrain(dict.fromkeys(columns, 1.0), 1, 1)

    def _spoils(self, column: int, error: float) -> None:
        """What a variable adds to the summed error; what could not be fitted is not taken."""
        if np.isfinite(error):
            self.objective[column] = error
        else:
            self.at_most({column: 1.0}, 0.0)

    def _tie(
        self, shared: tuple[int, ...], sizes: Sequence[int], variables: Mapping[tuple[tuple[int, ...], int], int]
    ) -> None:
        """A site's variables say the same about the shared choices as those say themselves."""
        for axis, place in enumerate(shared):
            for level in range(sizes[axis]):
                row: _Row = {column: 1.0 for (state, _), column in variables.items() if state[axis] == level}
                for column, value in self.option[place, level].items():
                    row[column] = row.get(column, 0.0) - value
                self._constrain(row, 0, 0)
        if not shared:
            self._constrain(dict.fromkeys(variables.values(), 1.0), 1, 1)

    def _own(
        self,
        table: OptionTable,
        own: tuple[int, ...],
        combinations: NDArray[np.int64],
        variables: Mapping[tuple[tuple[int, ...], int], int],
    ) -> None:
        for axis, place in enumerate(own):
            for level in range(len(table.space.choices[place].options)):
                taken = [column for (_, row), column in variables.items() if combinations[row, axis] == level]
                self.option[place, level] = dict.fromkeys(taken, 1.0)

    def _variable(self) -> int:
        self.count += 1
        return self.count - 1

    def _constrain(self, row: _Row, low: float, high: float) -> None:
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)


def _sum(rows: Sequence[_Row]) -> _Row:
    total: _Row = {}
    for row in rows:
        for column, value in row.items():
            total[column] = total.get(column, 0.0) + value
    return total
