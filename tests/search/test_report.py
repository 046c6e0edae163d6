"""The report: one page that loads nothing, escapes everything, and is there for runs in any state."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.search.config import load_spec
from planish.search.errors import UserError
from planish.search.front import Entry, front_document
from planish.search.objective import objectives_of
from planish.search.pictures import front_svg, history_svg
from planish.search.quantities import metric_cells, metric_names, quantity
from planish.search.report import hypervolume_history, write_report
from planish.search.rundir import RunDirectory
from planish.search.svg import ticks
from planish.search.trial import State, Trial
from planish.spaces import Choice, Kind, SearchSpace

EVIL = "<script>alert('1')</script>&\"]]>$title"
SPACE = SearchSpace(
    (Choice(EVIL, Kind.BLOCK, (None, EVIL)), Choice("b", Kind.RANK, (0, 4))), {EVIL: f"no kernel {EVIL}"}
)
OBJECTIVES = objectives_of(["accuracy", "latency"], ["cpu"])


def _trial(number: int, accuracy: float | None, latency_s: float, state: State = State.COMPLETE) -> Trial:
    latency = {"cpu": {"value": latency_s, "ci95": [latency_s * 0.95, latency_s * 1.05]}}
    metrics = {"accuracy": accuracy, "accuracy_ci95": [0.6, 0.95], "latency_s": latency, "size_bytes": 1e5 * latency_s}
    return Trial(number, SPACE.decode([number % 2, number // 2 % 2]), state, metrics, EVIL if number == 3 else None, 0)


TRIALS = [
    _trial(0, 0.92, 1.0),
    _trial(1, 0.9, 0.5),
    _trial(2, 0.85, 0.3),
    _trial(3, None, 0.3, State.FAILED),
    _trial(4, 0.8, 0.6, State.STOPPED),
    _trial(5, 0.1, 0.05, State.STOPPED),
]
FRONT = front_document(
    OBJECTIVES,
    [],
    Entry(TRIALS[0], measured=True),
    [Entry(trial, True, {"epochs": 10}, "trials/0001/artifact", {EVIL: "memory bound"}) for trial in TRIALS[1:]],
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    spec = load_spec(None, {"model": EVIL, "data": "digits32", "budget": "latency<=0.5x"})
    with RunDirectory.create(tmp_path / "r", spec, {"versions": {EVIL: "1"}, "devices": [{"name": EVIL}]}) as run:
        run.write_space(SPACE)
        for trial in TRIALS:
            run.append(trial)
        run.write_front(FRONT)
    return tmp_path / "r"


class _Page(HTMLParser):
    """Tags, attributes and text of a page; a tag that is closed in the wrong order is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def test_names_from_the_run_are_text_and_never_markup(run: Path) -> None:
    page = _page(write_report(run))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) >= 8  # model, site, option, layer, reason, slow site, error, versions, device


def test_the_page_loads_nothing_from_anywhere(run: Path) -> None:
    page = _page(write_report(run))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    for _, attributes in page.tags:
        assert set(attributes).isdisjoint(
            {"src", "href", "xlink:href", "srcset", "data", "action", "onload", "onclick"}
        )
    assert not re.search(r"url\(|@import", write_report(run).read_text())


def test_the_page_shows_front_choices_reasons_provenance_and_specification(run: Path) -> None:
    text = _page(write_report(run)).text
    parts = ("original", "90.00 % (-2.00)", "500 ms (0.5x)", "rank 4", "no kernel", "memory bound", "trials = 96")
    for part in parts:
        assert part in text


def test_a_run_without_front_says_how_to_carry_on(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "r", load_spec(None, {"model": "m", "data": "d"}), {}).close()
    with pytest.raises(UserError, match="planish resume"):
        write_report(tmp_path / "r")


def test_a_run_with_the_original_alone_has_a_report(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", load_spec(None, {"model": "m", "data": "d"}), {}) as run:
        run.write_front(front_document(OBJECTIVES, [], Entry(TRIALS[0], measured=False), []))
    assert "original" in _page(write_report(tmp_path / "r")).text


def test_an_infeasible_budget_is_told_on_top(run: Path) -> None:
    with RunDirectory.resume(run) as opened:
        bounds = [objective.__class__("latency[cpu]", "minimize", 0.1) for objective in OBJECTIVES[1:]]
        front = front_document(OBJECTIVES, bounds, Entry(TRIALS[0], True), [Entry(t, True) for t in TRIALS[1:3]])
        opened.write_front(front)
    assert "nearest is trial 2" in _page(write_report(run)).text


def _marks(svg: str, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def test_the_picture_has_a_point_for_every_member_and_every_other_trial_in_reach() -> None:
    titles = [title.text for title in _marks(front_svg(FRONT, TRIALS), "title")]
    for number in (1, 2, 4):
        assert any(str(title).startswith(f"trial {number}: ") for title in titles)
    assert sum(str(title).startswith("original: ") for title in titles) == 1
    # Trial 3 has no accuracy; trial 5 is so bad that showing it would flatten the front.
    assert not any(str(title).startswith(("trial 3: ", "trial 5: ")) for title in titles)


def test_the_picture_stands_at_the_right_place() -> None:
    svg = front_svg(FRONT, [])
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in _marks(svg, "circle")]
    square = next(r for r in _marks(svg, "rect") if r.attrib["width"] == "10")
    original = (float(square.attrib["x"]) + 5, float(square.attrib["y"]) + 5)
    by_speed = sorted([*circles, original])
    # From the fastest to the original: accuracy rises, so the picture's y falls.
    assert [y for _, y in by_speed] == sorted((y for _, y in by_speed), reverse=True)
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(by_speed)]
    assert gaps[1] / gaps[0] == pytest.approx(0.5 / 0.2, rel=0.01)  # coordinates are rounded to 0.1 pixels


def test_the_budget_is_drawn_only_where_there_is_one() -> None:
    assert "budget" not in front_svg(FRONT, TRIALS)
    assert ">budget<" in front_svg({**FRONT, "budget": [{"metric": "latency[cpu]", "bound": 0.5}]}, TRIALS)


@pytest.mark.parametrize("front", [{}, {"front": None, "original": {}}, {"front": [{"trial": 1, "metrics": {}}]}])
def test_a_picture_of_nothing_is_still_a_picture(front: dict[str, object]) -> None:
    assert _marks(front_svg(front, []), "path")
    assert _marks(history_svg([]), "path")


def test_of_several_devices_each_has_a_picture_and_a_column_says_whose_front_a_model_is_on(tmp_path: Path) -> None:
    def trial(number: int, accuracy: float, *seconds: float) -> Trial:
        latency = {name: {"value": value} for name, value in zip(("cpu", "cpu?threads=2"), seconds, strict=True)}
        metrics = {"accuracy": accuracy, "accuracy_ci95": [0.5, 1.0], "latency_s": latency}
        return Trial(number, SPACE.decode([number % 2, number // 2 % 2]), State.COMPLETE, metrics, None, 0)

    spec = load_spec(None, {"model": "m", "data": "d", "device": ["cpu", "cpu?threads=2"]})
    trials = [trial(0, 0.95, 1.0, 1.0), trial(1, 0.9, 0.5, 0.9), trial(2, 0.9, 0.9, 0.5)]
    front = front_document(
        spec.targets(), [], Entry(trials[0], measured=True), [Entry(t, True, None, None, {}) for t in trials[1:]]
    )
    with RunDirectory.create(tmp_path / "r", spec, {}) as run:
        run.write_space(SPACE)
        for one in trials:
            run.append(one)
        run.write_front(front)
    html = write_report(tmp_path / "r").read_text(encoding="utf-8")
    assert html.count("latency on cpu, relative to the original") == 1
    assert html.count("latency on cpu?threads=2, relative to the original") == 1
    own = [row.partition("</tr>")[0] for row in html.split("<tr>") if row.startswith('<td class="">')]
    cells = {row.partition(">")[2].partition("<")[0]: row for row in own if "(" in row or "original" in row}
    assert ">cpu, cpu?threads=2<" in cells["original"]
    assert ">cpu<" in cells["1"]
    assert ">cpu?threads=2<" in cells["2"]


def test_history_never_falls_and_ends_at_the_hypervolume_of_all(run: Path) -> None:
    history = hypervolume_history(OBJECTIVES, RunDirectory.open(run).history(), TRIALS[0].metrics)
    counts, volumes = zip(*history, strict=True)
    assert counts == (1, 2, 3, 4, 5, 6)
    assert list(volumes) == sorted(volumes)
    assert volumes[-1] == pytest.approx(0.9 * 0.5 + 0.85 * 0.2 + 0.1 * 0.25, rel=1e-12)


def test_history_joins_scores_with_what_was_measured(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", load_spec(None, {"model": "m", "data": "d"}), {}) as run:
        run.append(_trial(1, None, 1.0, State.RUNNING))
        run.score(1, {"accuracy": 0.8})
        run.measure(1, "cpu", {"latency_s": {"cpu": {"value": 0.25}}})
        run.rung(1, 0, 1, {"accuracy": 0.9})
        history = hypervolume_history(OBJECTIVES, run.history(), TRIALS[0].metrics)
    assert [count for count, _ in history] == [1]
    assert history[0][1] == pytest.approx(0.8 * 0.75, rel=1e-12)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 14
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)
    step = found[1] - found[0]
    digits = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(digits - round_step) for round_step in (1, 2, 5, 10)) < 1e-3


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00123, "s", "1.23 ms"),
        (2.0, "s", "2 s"),
        (3e-7, "s", "0.3 us"),
        (45_600, "B", "45.6 KB"),
        (0, "B", "0 B"),
        (4.08e7, "", "40.8 M"),
        (12, "", "12"),
        (0.003, "J", "3 mJ"),
        (None, "s", "-"),
        (True, "s", "-"),
    ],
)
def test_quantities_carry_the_prefix_that_suits_them(value: object, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_a_measured_ratio_goes_before_the_quotient_of_medians() -> None:
    metrics = {"latency_s": {"cpu": {"value": 0.4}}, "latency_ratio": {"cpu": 0.37}}
    assert metric_cells(metrics, TRIALS[0].metrics, metric_names([metrics])) == ["-", "400 ms (0.37x)"]


def test_joules_of_a_model_say_so_and_measured_ones_have_a_column_of_their_own() -> None:
    modelled: dict[str, object] = {"energy_j": 0.003}
    assert metric_names([modelled]) == ["accuracy", "energy (modelled)"]
    measured = modelled | {"energy_measured": True}
    assert metric_names([measured]) == ["accuracy", "energy"]
    assert metric_cells(measured, {"energy_j": 0.006}, ["energy"]) == ["3 mJ (0.5x)"]


def test_predicted_latencies_are_said_to_be_so(run: Path) -> None:
    assert "predicted" not in _page(write_report(run)).text.split("Specification")[0].lower()
    text = (run / "spec.toml").read_text(encoding="utf-8")
    (run / "spec.toml").write_text(text.replace('latency = "measured"', 'latency = "predicted"'), encoding="utf-8")
    assert "Latency is predicted by the device's latency model, not measured" in _page(write_report(run)).text
