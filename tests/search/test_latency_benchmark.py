"""The latency benchmark's bookkeeping: what is timed how often, what a killed run keeps, and which time counts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The benchmark's module, found as the benchmark finds its own."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("latency_models")
    sys.path.remove(str(BENCHMARKS))


@dataclass(frozen=True)
class Named:
    """A candidate as far as the benchmark looks at it before compiling."""

    name: str

    def key(self) -> str:
        return self.name


class Clock:
    """Stands for compiling and timing, whose outcome this machine decides: (seconds, quiet) of every call in turn."""

    def __init__(self, times: dict[str, Sequence[tuple[float, bool]]]) -> None:
        self.left: dict[str, Iterator[tuple[float, bool]]] = {name: iter(found) for name, found in times.items()}
        self.asked: list[str] = []

    def timed(self, candidates: Sequence[Named], database: Any) -> list[dict[str, Any]]:
        self.asked += [candidate.name for candidate in candidates]
        found = [(candidate.name, *next(self.left[candidate.name])) for candidate in candidates]
        return [{"key": k, "median_s": s, "quiet": quiet, "memory_error": 0, "calls": []} for k, s, quiet in found]


Measure = Callable[[Clock, str], list[Any]]


@pytest.fixture
def measure(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measure:
    """Measures candidates of these names with a clock, all in one file."""

    def measured(clock: Clock, names: str) -> list[Any]:
        monkeypatch.setattr(benchmark, "Compiled", lambda *_: clock)
        found: list[Any] = benchmark.measure(
            SimpleNamespace(), "cpu", [Named(name) for name in names], None, tmp_path / "kept"
        )
        return found

    return measured


def test_the_lower_of_two_times_counts(measure: Measure) -> None:
    clock = Clock({"a": [(2.0, True), (1.0, True)], "b": [(3.0, True), (4.0, True)]})
    found = measure(clock, "ab")
    assert [(network.seconds, network.quiet) for network in found] == [(1.0, True), (3.0, True)]
    # What one time each would have been, and how far two are apart.
    assert [network.times_s for network in found] == [(2.0, 1.0), (3.0, 4.0)]
    assert [network.spread for network in found] == pytest.approx([1.0, 1 / 3])
    assert clock.asked[:2] == ["a", "b"]
    assert sorted(clock.asked[2:]) == ["a", "b"]


def test_one_quiet_time_is_not_enough_and_disturbed_ones_do_not_count(measure: Measure) -> None:
    clock = Clock({"a": [(1.0, False), (2.0, True), (3.0, True)], "b": [(5.0, False), (4.0, False)] * 2})
    found = measure(clock, "ab")
    assert [(network.seconds, network.quiet) for network in found] == [(2.0, False), (4.0, False)]
    found = measure(clock, "ab")
    assert (found[0].seconds, found[0].quiet, found[1].quiet) == (2.0, True, False)


def test_what_was_timed_on_a_quiet_machine_is_not_timed_again(measure: Measure, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    measure(Clock({"a": [(2.0, True), (1.0, True)]}), "a")
    # As a kill would leave it: the line that was being written is cut short.
    kept.write_text(kept.read_text() + '{"key": "b", "med')
    clock = Clock({"b": [(3.0, True), (3.5, True)]})
    found = measure(clock, "ab")
    assert [(network.seconds, network.quiet) for network in found] == [(1.0, True), (3.0, True)]
    assert clock.asked == ["b", "b"]
    assert measure(Clock({}), "ab") == found
