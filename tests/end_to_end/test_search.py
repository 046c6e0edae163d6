"""The main job from a model in a single file to an exported, checked artifact."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.conftest import Command
from tests.end_to_end.small_search import events

pytestmark = [pytest.mark.tvm, pytest.mark.ray]


def front_of(run: Path) -> dict[str, Any]:
    found = json.loads((run / "front.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_a_run_has_the_files_that_are_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "spec.toml", "provenance.json", "devices.json", "space.json", "trials.jsonl", "study.log", "trials",
        "front.json", "front.csv", "report.html",
    } <= names  # fmt: skip


def test_json_on_stdout_is_the_front_and_nothing_else(finished: Path) -> None:
    printed = json.loads((finished.parent / "stdout.json").read_text(encoding="utf-8"))
    assert printed["front"] == front_of(finished)["front"]


def test_every_front_model_is_measured_faster_than_the_original_and_fine_tuned(finished: Path) -> None:
    front = front_of(finished)
    original = front["original"]["metrics"]
    assert front["front"]
    for entry in front["front"]:
        metrics: Mapping[str, Any] = entry["metrics"]
        assert entry["measured"] is True
        assert metrics["latency_ratio"]["cpu"] <= 0.9
        assert metrics["latency_s"]["cpu"]["value"] < original["latency_s"]["cpu"]["value"]
        low, high = metrics["accuracy_ci95"]
        assert low <= metrics["accuracy"] <= high
        assert entry["recipe"]["epochs"] == 2
        assert 0 <= metrics["test_accuracy"] <= 1
        assert (finished / entry["artifact"] / "manifest.json").is_file()


def test_what_enters_the_first_rung_was_scored_on_all_of_the_validation_split(finished: Path) -> None:
    told = events(finished)
    rescored = {e["trial"] for e in told if e["event"] == "rescore"}
    entered = {str(e["phase"]): e["trials"] for e in told if e["event"] == "phase" and "trials" in e}
    assert set(entered) == {"rescore", "distill to epoch 1", "distill to epoch 2"}
    assert rescored == set(entered["rescore"])  # type: ignore[call-overload]
    assert set(entered["distill to epoch 1"]) <= rescored  # type: ignore[call-overload]


def test_the_change_of_test_accuracy_has_an_interval(finished: Path) -> None:
    front = front_of(finished)
    base = front["original"]["metrics"]["test_accuracy"]
    for entry in front["front"]:
        if entry["trial"]:
            low, high = entry["metrics"]["test_accuracy_change_ci95"]
            assert low <= entry["metrics"]["test_accuracy"] - base <= high


def test_no_front_model_is_beaten_by_another_in_all_objectives(finished: Path) -> None:
    def costs(entry: Mapping[str, Any]) -> tuple[float, float, float]:
        m = entry["metrics"]
        return -m["accuracy"], m["latency_s"]["cpu"]["value"], m["size_bytes"]

    rows = [costs(entry) for entry in front_of(finished)["front"]]
    for a in rows:
        for b in rows:
            assert not (all(x <= y for x, y in zip(a, b, strict=True)) and a != b), (a, b)


def test_the_seconds_of_a_trial_are_its_ratio_times_the_originals(finished: Path) -> None:
    front = front_of(finished)
    base = front["original"]["metrics"]["latency_s"]["cpu"]["value"]
    for entry in front["front"]:
        metrics = entry["metrics"]
        assert math.isclose(metrics["latency_s"]["cpu"]["value"], base * metrics["latency_ratio"]["cpu"], rel_tol=1e-9)


def test_every_layer_without_options_says_why(finished: Path) -> None:
    space = json.loads((finished / "space.json").read_text(encoding="utf-8"))
    sites = {choice["site"] for choice in space["choices"]}
    for layer in ("0", "2", "6"):
        assert layer in sites or space["left_out"][layer]


def test_every_site_that_a_model_of_the_front_leaves_as_it_is_says_why(finished: Path) -> None:
    front = front_of(finished)
    unchanged = front["original"]["options"]
    for entry in front["front"]:
        changed = {name.rpartition(":")[0] for name, option in entry["options"].items() if option != unchanged[name]}
        as_they_are = {name.rpartition(":")[0] for name in unchanged} - changed
        if entry["trial"]:
            assert set(entry["left_alone"]) == as_they_are
            assert all(entry["left_alone"].values())


def test_a_finished_run_resumes_without_evaluating_anything(planish: Command, finished: Path) -> None:
    before = events(finished)
    done = planish("resume", finished)
    assert done.returncode == 0, done.stderr
    assert [e for e in events(finished) if e["event"] not in ("session", "phase")] == [
        e for e in before if e["event"] not in ("session", "phase")
    ]


def test_the_exported_best_passes_bench_and_runs_without_planish(
    planish: Command, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    assert planish("export", finished, "--pick", "latency<=0.9x", "--out", out).returncode == 0
    done = planish("bench", out, "--json", "--runs", 5)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["parity_ok"] is True
    assert result["speedup"] > 1
    ran = subprocess.run(
        [*_isolated_python(), "run_model.py"], cwd=out, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_status_and_report_of_a_finished_run(planish: Command, finished: Path) -> None:
    status = json.loads(planish("status", finished, "--json").stdout)
    assert status["phase"] == "done"
    assert status["front"] == len(front_of(finished)["front"])
    assert planish("report", finished).returncode == 0
    assert "<svg" in (finished / "report.html").read_text(encoding="utf-8")


def test_the_same_folder_with_another_specification_is_refused_and_kept(
    planish: Command, finished: Path, spec: Path
) -> None:
    before = (finished / "trials.jsonl").read_bytes()
    done = planish("search", spec, "--out", finished, "--seed", 7)
    assert done.returncode == 2
    assert "seed" in done.stderr
    assert "Traceback" not in done.stderr
    assert (finished / "trials.jsonl").read_bytes() == before


def _isolated_python() -> list[str]:
    import sys

    # Without the repository on the path, so that an import of planish would fail in an environment without it.
    return [sys.executable, "-E"]
