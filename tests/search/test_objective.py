"""Budgets are read as the product's table of words says, and refuse what it does not say."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.search.errors import UserError
from planish.search.objective import Objective, objectives_of, parse_budget

ORIGINAL = {
    "accuracy": 0.92,
    "latency_s": {"cpu": {"value": 0.004, "ci95": None}, "cuda": {"value": 0.001, "ci95": None}},
    "size_bytes": 1_000_000,
    "peak_memory_bytes": 2_000_000,
    "energy_j": 0.01,
    "macs": 40_000_000,
}


@pytest.mark.parametrize(
    ("text", "metric", "bound"),
    [
        ("latency<=0.5x", "latency[cpu]", 0.002),
        ("latency<=2ms", "latency[cpu]", 0.002),
        ("latency <= 2 ms", "latency[cpu]", 0.002),
        ("latency[cpu]<=1.5e3us", "latency[cpu]", 0.0015),
        ("latency<=300µs", "latency[cpu]", 0.0003),
        ("latency<=1s", "latency[cpu]", 1.0),
        ("size<=300KB", "size_bytes", 300e3),
        ("size<=300KiB", "size_bytes", 300 * 1024),
        ("size<=1.5MB", "size_bytes", 1.5e6),
        ("size<=1MiB", "size_bytes", 2**20),
        ("size<=900B", "size_bytes", 900),
        ("size<=.25x", "size_bytes", 250e3),
        ("memory<=1MB", "peak_memory_bytes", 1e6),
        ("energy<=3mJ", "energy_j", 3e-3),
        ("macs<=0.5x", "macs", 20e6),
        ("macs<=20M", "macs", 20e6),
        ("accuracy>=-0.5pp", "accuracy", 0.915),
        ("accuracy>=0.91", "accuracy", 0.91),
    ],
)
def test_budget_resolves_to_base_units(text: str, metric: str, bound: float) -> None:
    (budget,) = parse_budget(text, ["cpu"])
    objective = budget.resolve(ORIGINAL)
    assert objective.bound == pytest.approx(bound, rel=1e-12)
    names = {"size_bytes": "size", "peak_memory_bytes": "memory", "energy_j": "energy"}
    assert objective.metric == names.get(metric, metric)


def test_latency_without_device_bounds_every_device_by_its_own_original() -> None:
    bounds = [budget.resolve(ORIGINAL) for budget in parse_budget("latency<=0.5x", ["cpu", "cuda"])]
    assert [(b.metric, b.bound) for b in bounds] == [("latency[cpu]", 0.002), ("latency[cuda]", 0.0005)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("latencyy<=1ms", "did you mean 'latency'"),
        ("latency<=2", "no unit"),
        ("latency<=2KB", "'KB'"),
        ("latency<=2pp", "'pp'"),
        ("latency>=2ms", "'>='"),
        ("latency<2ms", "'<'"),
        ("accuracy<=0.9", "'<='"),
        ("accuracy>=91", "fraction from 0 to 1"),
        ("accuracy>=0.9x", "'x'"),
        ("size<=0KB", "above 0"),
        ("size<=-3KB", "above 0"),
        ("size<=1e999KB", "finite"),
        ("size[cpu]<=3KB", "only latency"),
        ("latency[gpu]<=3ms", "'gpu'"),
        ("latency", "METRIC<=NUMBER"),
        ("", "METRIC<=NUMBER"),
        ("<=3ms", "METRIC<=NUMBER"),
        ("size<=3KB; rm", "METRIC<=NUMBER"),
    ],
)
def test_what_is_not_a_budget_is_refused_in_one_line_with_the_allowed_forms(text: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        parse_budget(text, ["cpu", "cuda"])
    assert told in str(error.value)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(max_size=30))
def test_any_text_is_a_budget_or_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        parse_budget(text, ["cpu"])


def test_a_device_file_is_named_by_its_stem() -> None:
    (budget,) = parse_budget("latency[boards/mine.toml]<=2ms", ["mine"])
    assert budget.metric == "latency[mine]"


def test_relative_budget_on_an_unknown_metric_says_what_to_do() -> None:
    (budget,) = parse_budget("energy<=0.5x", ["cpu"])
    with pytest.raises(UserError, match=r"energy.*absolute bound"):
        budget.resolve({"accuracy": 0.9})


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_allows_and_loss_agree_with_the_goal(value: float, bound: float) -> None:
    assert Objective("size", "minimize", bound).allows(value) == (value <= bound)
    assert Objective("accuracy", "maximize", bound).allows(value) == (value >= bound)
    assert Objective("size", "minimize").allows(value)
    assert (Objective("accuracy", "maximize").loss(value) < Objective("accuracy", "maximize").loss(bound)) == (
        value > bound
    )


def test_nan_is_allowed_by_no_objective() -> None:
    assert not Objective("size", "minimize").allows(math.nan)
    assert not Objective("size", "minimize", 3.0).allows(math.nan)


@pytest.mark.parametrize(
    "metrics",
    [{}, {"latency_s": None}, {"latency_s": {}}, {"latency_s": {"cpu": None}}, {"latency_s": {"cpu": {"value": None}}}],
)
def test_an_absent_latency_is_nan(metrics: dict[str, object]) -> None:
    assert math.isnan(Objective("latency[cpu]", "minimize").value(metrics))


def test_latency_is_an_objective_on_every_device() -> None:
    names = [objective.metric for objective in objectives_of(["accuracy", "latency", "size"], ["cpu", "cuda"])]
    assert names == ["accuracy", "latency[cpu]", "latency[cuda]", "size"]


@pytest.mark.parametrize("metrics", [["accuracy", "lateny"], ["accuracy", "accuracy"]])
def test_unknown_or_repeated_objectives_are_refused(metrics: list[str]) -> None:
    with pytest.raises(UserError, match=r"did you mean 'latency'|twice"):
        objectives_of(metrics, ["cpu"])
