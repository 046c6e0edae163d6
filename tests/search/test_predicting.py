"""The kernel times that a run predicts by: copied when it begins, and refused where they are not those any more."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch
from torch import nn

from planish.compilers import kernel_times
from planish.compilers.kernel_times import database_of
from planish.hwmodels.kernel_database import KernelTime
from planish.hwmodels.quiet import Settled
from planish.hwmodels.workload import Workload
from planish.search.config import load_spec
from planish.search.data import Data, Split
from planish.search.errors import UserError
from planish.search.evaluate import Evaluator
from planish.search.predicting import keep_times
from planish.search.tasks import Task

pytestmark = pytest.mark.tvm
WORK = Workload("", "dense", {"m": 1, "k": 4}, 16, 64, 32, 64, 1, "", 4.0)
TIME = Settled(2e-6, 1.9e-6, 2.1e-6, 12, True)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    split = Split(torch.randn(8, 3, 2, 2), torch.arange(8) % 4)
    task = Task(model, Data(split, split, split, ("a", "b", "c", "d")))
    return Evaluator(load_spec(None, {"model": "own", "data": "own"}), task)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_measured_later_changes_no_run(evaluator: Evaluator, cache: Path, tmp_path: Path) -> None:
    device = evaluator.devices["cpu"]
    database_of(device).add([KernelTime(WORK, TIME)], {"reference": 1e-5})
    kept = keep_times(evaluator, tmp_path)
    assert database_of(device, kept).times() == {WORK.key(): KernelTime(WORK, TIME)}
    database_of(device).add([KernelTime(WORK, Settled(1e-6, 1e-6, 1e-6, 12, True))], {})
    assert keep_times(evaluator, tmp_path) == kept
    assert database_of(device, kept).times()[WORK.key()].time == TIME


def test_tiles_that_are_measured_later_change_no_prediction(evaluator: Evaluator, cache: Path, tmp_path: Path) -> None:
    device = evaluator.devices["cpu"]
    database_of(device).add_tiles({"conv": "direct"})
    evaluator.predict_by(keep_times(evaluator, tmp_path))
    assert evaluator.devices["cpu"].tiles == {"conv": "direct"}
    database_of(device).add_tiles({"conv": "winograd"})
    evaluator.predict_by(keep_times(evaluator, tmp_path))
    assert evaluator.devices["cpu"].tiles == {"conv": "direct"}


def test_a_run_that_began_with_no_times_goes_on_with_none(evaluator: Evaluator, cache: Path, tmp_path: Path) -> None:
    device = evaluator.devices["cpu"]
    kept = keep_times(evaluator, tmp_path)
    database_of(device).add([KernelTime(WORK, TIME)], {})
    assert database_of(device, keep_times(evaluator, tmp_path)).times() == {}
    assert kept.exists()


def test_times_of_other_kernels_are_no_ground_to_go_on(
    evaluator: Evaluator, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_times(evaluator, tmp_path)
    monkeypatch.setattr(kernel_times, "times_version", lambda: "next")
    with pytest.raises(UserError, match=r"kernels\.sqlite .* of other kernels than this version .*\(next\)") as caught:
        keep_times(evaluator, tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_times_are_told_and_not_replaced_by_a_guess(evaluator: Evaluator, cache: Path, tmp_path: Path) -> None:
    database_of(evaluator.devices["cpu"]).add([KernelTime(WORK, TIME)], {})
    kept = keep_times(evaluator, tmp_path)
    with sqlite3.connect(kept) as connection:
        connection.execute("UPDATE times SET median_s = -1")
    connection.close()
    with pytest.raises(UserError, match=r"cannot be read: .* is damaged"):
        keep_times(evaluator, tmp_path)


def test_times_that_are_lost_are_not_replaced_by_later_ones(evaluator: Evaluator, cache: Path, tmp_path: Path) -> None:
    keep_times(evaluator, tmp_path).unlink()
    with pytest.raises(UserError, match=r"kernels\.sqlite is lost: the latencies of 3 trials were predicted by it"):
        keep_times(evaluator, tmp_path, scored=3)
    assert keep_times(evaluator, tmp_path, scored=0).exists()
