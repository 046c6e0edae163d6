"""Which networks a latency table is made from."""

from __future__ import annotations

import numpy as np
import pytest

from planish.search.latency_table import near_original, table_candidates
from planish.spaces import Candidate, Choice, Kind, SearchSpace

_OPTIONS = {
    Kind.PRUNE: (None, 0.25, 0.5, 0.75),
    Kind.RANK: (None, 0.5, 0.25),
    Kind.BITS: (None, "bf16", 8, 4),
    Kind.BLOCK: (None, "separable", "pointwise"),
    Kind.CLUSTER: (None, 16),
}


@pytest.fixture
def space() -> SearchSpace:
    """Eight layers with all five families each."""
    choices = [Choice(f"layer{n}", kind, options) for n in range(8) for kind, options in _OPTIONS.items()]
    return SearchSpace(tuple(choices), {})


def test_any_beginning_of_the_candidates_covers_the_space(space: SearchSpace) -> None:
    found = table_candidates(space, 20, seed=1)
    assert len({candidate.key() for candidate in found}) == len(found) == 20
    assert found[0] == space.original()
    assert table_candidates(space, 20, seed=1) == found != table_candidates(space, 20, seed=2)
    chosen = [space.encode(candidate) for candidate in found[:12]]
    constant = [choice for place, choice in enumerate(space.choices) if len({int(c[place]) for c in chosen}) == 1]
    assert all(choice.kind is Kind.CLUSTER for choice in constant)  # codebooks change no latency
    more = [space.sample(np.random.default_rng(n)) for n in range(30)]
    assert table_candidates(space, 20, more=more)[: len(more) + 1] == [space.original(), *more]


def test_a_table_has_candidates_near_the_original(space: SearchSpace) -> None:

    def changed(candidate: Candidate) -> float:
        return float(np.mean(space.encode(candidate) > 0))

    rng = np.random.default_rng(0)
    assert near_original(space, 0.0, rng) == space.original()
    assert 0.1 < np.mean([changed(near_original(space, 0.25, rng)) for _ in range(30)]) < 0.25
    # What neither treats every site alike nor changes most of them.
    near = [c for c in table_candidates(space, 32) if 0 < changed(c) < 0.4 and len(set(c.options.values())) > 2]
    assert len(near) >= 2
