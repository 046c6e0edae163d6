"""What stands on the front: only improvements, only what keeps the budget, and the nearest miss where nothing does."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest

from planish.search.errors import UserError
from planish.search.front import Entry, choose, front_csv, front_document, improves
from planish.search.objective import Objective, objectives_of, parse_budget
from planish.search.trial import State, Trial
from planish.spaces import Candidate

OBJECTIVES = objectives_of(["accuracy", "latency"], ["cpu"])


def _entry(number: int, accuracy: float, latency_s: float, size: int = 100, state: State = State.COMPLETE) -> Entry:
    latency = {"cpu": {"value": latency_s, "ci95": [latency_s * 0.9, latency_s * 1.1]}}
    metrics = {"accuracy": accuracy, "accuracy_ci95": [0.0, 1.0], "latency_s": latency, "size_bytes": size}
    return Entry(Trial(number, Candidate({"a": number}), state, metrics, None, 0), measured=True)


ORIGINAL = _entry(0, 0.9, 1.0)


def _bounds(*texts: str) -> list[Objective]:
    return [b.resolve(ORIGINAL.trial.metrics) for text in texts for b in parse_budget(text, ["cpu"])]


def _numbers(document: dict[str, object]) -> list[object]:
    front = document["front"]
    assert isinstance(front, list)
    return [entry["trial"] for entry in front]


def test_only_what_no_other_beats_and_is_faster_than_the_original_stands_on_the_front() -> None:
    entries = [_entry(1, 0.8, 0.5), _entry(2, 0.7, 0.6), _entry(3, 0.95, 1.2), _entry(4, 0.5, 0.1)]
    document = front_document(OBJECTIVES, [], ORIGINAL, entries)
    # 2 is beaten by 1; 3 is more accurate but slower than the original.
    assert _numbers(document) == [0, 1, 4]
    # 0.8 * (1 - 0.5) + 0.5 * (0.5 - 0.1)
    assert document["hypervolume"] == pytest.approx(0.6, rel=1e-12)


@pytest.mark.parametrize("latency_s", [1.0, 1.5, math.nan])
def test_what_is_not_faster_is_no_improvement_however_accurate_or_small(latency_s: float) -> None:
    trial = _entry(1, 1.0, latency_s, size=1).trial
    with_size = objectives_of(["accuracy", "latency", "size"], ["cpu"])
    assert not improves(with_size, trial, ORIGINAL.trial.metrics)


def test_a_ratio_measured_in_turns_goes_before_the_quotient_of_two_measurements() -> None:
    trial = _entry(1, 0.9, 0.9).trial
    slower = Trial(1, trial.candidate, trial.state, {**trial.metrics, "latency_ratio": {"cpu": 1.01}}, None, 0)
    assert improves(OBJECTIVES, trial, ORIGINAL.trial.metrics)
    assert not improves(OBJECTIVES, slower, ORIGINAL.trial.metrics)


def test_where_size_is_the_objective_smaller_is_an_improvement_and_faster_is_none() -> None:
    objectives = objectives_of(["accuracy", "size"], ["cpu"])
    assert improves(objectives, _entry(1, 0.8, 2.0, size=99).trial, ORIGINAL.trial.metrics)
    assert not improves(objectives, _entry(1, 0.8, 0.1, size=100).trial, ORIGINAL.trial.metrics)


@pytest.mark.parametrize("state", [state for state in State if state is not State.COMPLETE])
def test_only_complete_trials_are_offered(state: State) -> None:
    document = front_document(OBJECTIVES, [], ORIGINAL, [_entry(1, 0.8, 0.5, state=state)])
    assert _numbers(document) == [0]


def test_the_original_stands_under_its_own_key_even_where_it_is_beaten() -> None:
    document = front_document(OBJECTIVES, [], ORIGINAL, [_entry(1, 0.95, 0.5)])
    assert _numbers(document) == [1]
    assert document["original"] == ORIGINAL.to_json(True)


def test_within_a_budget_only_what_keeps_it_is_returned() -> None:
    entries = [_entry(1, 0.85, 0.7), _entry(2, 0.8, 0.5), _entry(3, 0.7, 0.3)]
    document = front_document(OBJECTIVES, _bounds("latency<=0.5x", "accuracy>=0.75"), ORIGINAL, entries)
    assert _numbers(document) == [2]
    assert document["nearest_miss"] is None


def test_a_budget_that_the_original_keeps_leaves_out_what_does_not() -> None:
    entries = [_entry(1, 0.8, 0.5), _entry(2, 0.5, 0.1)]
    assert _numbers(front_document(OBJECTIVES, _bounds("accuracy>=0.75"), ORIGINAL, entries)) == [0, 1]


def test_an_infeasible_budget_gives_the_best_so_far_and_the_nearest_miss() -> None:
    entries = [_entry(1, 0.85, 0.7), _entry(2, 0.8, 0.5), _entry(3, 0.7, 0.45)]
    document = front_document(OBJECTIVES, _bounds("latency<=0.4x", "accuracy>=0.89"), ORIGINAL, entries)
    assert _numbers(document) == [0, 1, 2, 3]
    miss = document["nearest_miss"]
    assert isinstance(miss, dict)
    # Shares by which the worse bound is missed: 0.75 (latency), 0.25 (latency), 0.21 (accuracy).
    assert miss["trial"] == 3


def test_where_only_the_original_keeps_a_budget_the_nearest_miss_is_named() -> None:
    entries = [_entry(1, 0.8, 0.5), _entry(2, 0.84, 0.6), _entry(3, 0.5, 0.1)]
    miss = front_document(OBJECTIVES, _bounds("accuracy>=0.85"), ORIGINAL, entries)["nearest_miss"]
    assert isinstance(miss, dict)
    assert (miss["trial"], miss["meets_budget"]) == (2, False)


def test_no_candidate_at_all_gives_the_original_alone() -> None:
    document = front_document(OBJECTIVES, _bounds("latency<=0.4x"), ORIGINAL, [])
    assert _numbers(document) == [0]
    assert document["nearest_miss"] is None
    assert document["hypervolume"] == 0


def test_the_most_accurate_that_keeps_the_budget_is_chosen_and_never_the_original() -> None:
    entries = [_entry(1, 0.85, 0.7), _entry(2, 0.8, 0.5), _entry(3, 0.7, 0.3)]
    document = front_document(OBJECTIVES, [], ORIGINAL, entries)
    assert choose(document, ())["trial"] == 1
    assert choose(document, parse_budget("latency<=0.5x", ["cpu"]))["trial"] == 2
    assert choose(document, parse_budget("latency<=400ms", ["cpu"]))["trial"] == 3


def test_of_equally_accurate_ones_the_fastest_is_chosen_then_the_smallest() -> None:
    objectives = objectives_of(["accuracy", "latency", "size"], ["cpu"])
    entries = [_entry(1, 0.8, 0.5, 20), _entry(2, 0.8, 0.3, 50), _entry(3, 0.8, 0.4, 30), _entry(4, 0.7, 0.1, 10)]
    assert choose(front_document(objectives, [], ORIGINAL, entries), ())["trial"] == 2


def test_a_pick_that_nothing_keeps_tells_what_is_reached() -> None:
    document = front_document(OBJECTIVES, [], ORIGINAL, [_entry(1, 0.8, 0.5)])
    with pytest.raises(UserError, match=r"latency<=0.1x \(latency\[cpu\] reaches 0.5 and the bound is 0.1\).*--trial"):
        choose(document, parse_budget("latency<=0.1x", ["cpu"]))
    with pytest.raises(UserError, match="empty but for the original"):
        choose(front_document(OBJECTIVES, [], ORIGINAL, []), ())


def test_csv_has_a_row_for_the_original_and_each_entry_with_numbers_as_they_are() -> None:
    text = front_csv(front_document(OBJECTIVES, [], ORIGINAL, [_entry(1, 0.8, 0.1 + 0.2)]))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["trial"] for row in rows] == ["0", "1"]
    assert float(rows[1]["latency_s[cpu]"]) == 0.1 + 0.2
    assert float(rows[1]["latency_s[cpu] low"]) == (0.1 + 0.2) * 0.9
    assert (rows[1]["accuracy low"], rows[1]["option a"]) == ("0.0", "1")


def test_csv_quotes_what_would_break_it(tmp_path: Path) -> None:
    entry = Entry(Trial(0, Candidate({'a",\n': "x,y"}), State.COMPLETE, {"accuracy": 0.5}, None, 0), measured=False)
    rows = list(csv.reader(io.StringIO(front_csv(front_document(OBJECTIVES, [], entry, [])))))
    assert [len(row) for row in rows] == [len(rows[0])] * 2
    assert rows[1][rows[0].index('option a",\n')] == "x,y"


def _on_two(number: int, accuracy: float, cpu: float, board: float) -> Entry:
    base = _entry(number, accuracy, cpu)
    metrics = {**base.trial.metrics, "latency_s": {"cpu": {"value": cpu}, "board": {"value": board}}}
    return Entry(Trial(number, base.trial.candidate, State.COMPLETE, metrics, None, 0), measured=True)


TWO = objectives_of(["accuracy", "latency"], ["cpu", "board"])


def test_of_several_devices_each_has_a_front_of_its_own() -> None:
    original = _on_two(0, 0.95, 1.0, 10.0)
    # 1 is for the cpu, 2 for the board, 3 is beaten on either, 4 by nothing on both.
    entries = [_on_two(1, 0.9, 0.2, 9.0), _on_two(2, 0.9, 0.8, 2.0), _on_two(3, 0.85, 0.9, 9.5)]
    document = front_document(TWO, [], original, [*entries, _on_two(4, 0.8, 0.1, 1.0)])
    assert sorted(map(int, map(str, _numbers(document)))) == [0, 1, 2, 4]
    assert document["devices"] == {"cpu": [0, 1, 4], "board": [0, 2, 4]}
    assert "devices" not in front_document(OBJECTIVES, [], ORIGINAL, [])


def test_what_is_slower_on_one_device_is_on_the_fronts_of_the_others() -> None:
    # 1 is slower on the board; 2 is slower on the cpu, and more accurate than the original; 3 is faster on both.
    # 4 is slower on both: it is no improvement.
    entries = [_on_two(1, 0.9, 0.2, 11.0), _on_two(2, 0.96, 1.1, 2.0), _on_two(3, 0.7, 0.9, 1.0)]
    document = front_document(TWO, [], _on_two(0, 0.95, 1.0, 10.0), [*entries, _on_two(4, 0.97, 1.2, 12.0)])
    assert sorted(map(int, map(str, _numbers(document)))) == [0, 1, 2, 3]
    assert document["devices"] == {"cpu": [0, 1], "board": [2, 3]}


def test_what_is_faster_on_every_device_is_chosen_before_what_is_not() -> None:
    original = _on_two(0, 0.95, 1.0, 10.0)
    document = front_document(TWO, [], original, [_on_two(1, 0.9, 0.2, 11.0), _on_two(2, 0.8, 0.5, 5.0)])
    assert choose(document, ())["trial"] == 2
    assert choose(document, parse_budget("latency[cpu]<=0.3x", ["cpu", "board"]))["trial"] == 1
