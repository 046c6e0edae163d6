"""Trials survive JSON."""

from __future__ import annotations

import json
import math

import pytest

from planish.search.trial import State, Trial, finite
from planish.spaces import Candidate

TRIAL = Trial(
    number=7,
    candidate=Candidate({"a:prune": 0.5, "b:bits": None, "c:block": "ghost", "d:rank": 8}),
    state=State.COMPLETE,
    metrics={"accuracy": 0.91, "latency_s": {"cpu": {"value": 1.5e-3, "ci95": [1.4e-3, 1.6e-3]}}, "energy_j": None},
    error=None,
    seed=3,
    batch=2,
)


@pytest.mark.parametrize("state", list(State))
def test_json_gives_back_the_same_trial_in_every_state(state: State) -> None:
    trial = Trial(**{**vars(TRIAL), "state": state, "error": "out of memory" if state is State.FAILED else None})
    assert Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial


def test_a_nan_metric_becomes_null_at_any_depth() -> None:
    trial = Trial(**{**vars(TRIAL), "metrics": {"accuracy": math.nan, "latency_s": {"cpu": {"value": math.inf}}}})
    text = json.dumps(trial.to_json(), allow_nan=False)
    assert json.loads(text)["metrics"] == {"accuracy": None, "latency_s": {"cpu": {"value": None}}}


def test_finite_turns_tuples_into_lists_and_keeps_the_rest() -> None:
    assert finite({"a": (1, 2.5, None, "x", True)}) == {"a": [1, 2.5, None, "x", True]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trial", "7"),
        ("trial", True),
        ("options", [1]),
        ("options", {"a": [1]}),
        ("options", {"a": True}),
        ("metrics", None),
        ("seed", 1.5),
        ("state", "pruned"),
    ],
)
def test_a_wrong_type_is_told_as_value_error_naming_the_value(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"must be|is not"):
        Trial.from_json({**TRIAL.to_json(), key: value})
