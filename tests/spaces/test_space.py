"""Choices, candidates and spaces, compared with their definitions."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.spaces import Candidate, Choice, Kind, Option, SearchSpace

OPTIONS: st.SearchStrategy[Option] = st.one_of(
    st.none(), st.integers(-4, 300), st.floats(0, 1, allow_nan=False), st.sampled_from(["svd:16", "tucker:8x8"])
)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    names = draw(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(Kind)), unique=True, max_size=5))
    choices = []
    for site, kind in names:
        options = draw(st.lists(OPTIONS, min_size=2, max_size=4, unique_by=json.dumps))
        choices.append(Choice(site, kind, tuple(options)))
    return SearchSpace(tuple(choices), {"bn": "no choice"})


@given(spaces(), st.integers(0, 2**32 - 1))
def test_decode_undoes_encode(space: SearchSpace, seed: int) -> None:
    candidate = space.sample(np.random.default_rng(seed))
    assert space.decode(space.encode(candidate)) == candidate


@given(spaces())
def test_size_counts_the_candidates_one_by_one(space: SearchSpace) -> None:
    indices = itertools.product(*(range(len(choice.options)) for choice in space.choices))
    assert len({space.decode(index).key() for index in indices}) == space.size()


@given(spaces())
def test_a_space_survives_json_with_the_types_of_its_options(space: SearchSpace) -> None:
    again = SearchSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    types = [[type(option) for option in choice.options] for choice in space.choices]
    assert [[type(option) for option in choice.options] for choice in again.choices] == types


@given(spaces(), st.integers(0, 2**32 - 1))
def test_neighbours_are_all_candidates_at_distance_one(space: SearchSpace, seed: int) -> None:
    candidate = space.sample(np.random.default_rng(seed))
    neighbours = list(space.neighbours(candidate))
    assert len({n.key() for n in neighbours}) == len(neighbours) == sum(len(c.options) - 1 for c in space.choices)
    assert all((space.encode(n) != space.encode(candidate)).sum() == 1 for n in neighbours)


def test_the_original_takes_the_first_option_everywhere() -> None:
    space = SearchSpace((Choice("a", Kind.BITS, (None, 8)), Choice("a", Kind.PRUNE, (None, 0.5))), {})
    assert space.original() == Candidate({"a:bits": None, "a:prune": None})
    assert not space.encode(space.original()).any()


def test_sampling_reaches_every_candidate() -> None:
    space = SearchSpace((Choice("a", Kind.BITS, (None, 8, 4)), Choice("b", Kind.PRUNE, (None, 0.5))), {})
    rng = np.random.default_rng(0)
    assert len({space.sample(rng).key() for _ in range(200)}) == space.size()


def test_a_key_is_the_same_in_another_process_and_in_another_order() -> None:
    options: dict[str, Option] = {"b:prune": 0.25, "a:bits": 8, "a:rank": "svd:16", "c:block": None}
    code = (
        "import json, sys; from planish.spaces import Candidate; "
        "print(Candidate(dict(reversed(json.loads(sys.argv[1]).items()))).key())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options)], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == Candidate(options).key()


def test_importing_the_space_loads_no_torch() -> None:
    code = "import sys, planish.spaces; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "False"


def test_options_that_differ_only_in_type_have_different_keys() -> None:
    assert Candidate({"a:bits": 1}).key() != Candidate({"a:bits": 1.0}).key()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a:bits": 3}, "option 3 of choice 'a:bits' is not one of"),
        ({"a:bits": 8.0}, "is not one of"),
        ({}, "no option for choice 'a:bits'"),
        ({"a:bits": 8, "b:bits": 8}, "names b:bits"),
    ],
)
def test_a_candidate_of_another_space_is_refused(options: dict[str, Option], message: str) -> None:
    space = SearchSpace((Choice("a", Kind.BITS, (None, 8)),), {})
    with pytest.raises(ValueError, match=message):
        space.encode(Candidate(options))


@pytest.mark.parametrize("indices", [[2], [-1], [0, 0], []])
def test_indices_outside_the_space_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"indices|outside"):
        SearchSpace((Choice("a", Kind.BITS, (None, 8)),), {}).decode(indices)


def test_choices_that_are_no_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2"):
        Choice("a", Kind.BITS, (None,))
    with pytest.raises(ValueError, match="repeats an option"):
        Choice("a", Kind.BITS, (None, 8, 8))
    with pytest.raises(ValueError, match="two choices named a:bits"):
        SearchSpace((Choice("a", Kind.BITS, (None, 8)), Choice("a", Kind.BITS, (None, 4))), {})
    with pytest.raises(ValueError, match="'choices'"):
        SearchSpace.from_json({"choices": 3, "left_out": {}})
