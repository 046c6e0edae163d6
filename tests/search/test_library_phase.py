"""The library of a search on its workers: what could not be looked at is neither taken for harmless nor kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from planish.search.config import load_spec
from planish.search.data import Data, Split
from planish.search.evaluate import Evaluator, Job
from planish.search.library_phase import LIBRARY, library
from planish.search.progress import Progress
from planish.search.tasks import Task
from planish.search.workers import Failure, Pool

pytestmark = pytest.mark.tvm


class Here:
    """A pool that evaluates in this process, and fails in some jobs."""

    def __init__(self, evaluator: Evaluator, failing: Sequence[int]) -> None:
        self.evaluator, self.failing, self.asked = evaluator, set(failing), 0

    def run(self, method: str, jobs: Sequence[tuple[Job, tuple[Any, ...]]], done: Callable[[Job, Any], None]) -> None:
        for job, arguments in jobs:
            self.asked += 1
            lost = job.number in self.failing
            done(job, Failure("out of memory") if lost else getattr(self.evaluator, method)(job, *arguments))


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 36, 4),
    ).eval()  # fmt: skip
    split = Split(torch.randn(32, 3, 6, 6), torch.arange(32) % 4)
    task = Task(model, Data(split, split, split, ("a", "b", "c", "d")))
    return Evaluator(load_spec(None, {"model": "own", "data": "own", "space.lanes": 8}), task)


def test_a_part_that_failed_is_dear_and_looked_at_again_the_next_time(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator.times = tmp_path / "no times.sqlite"
    pool = Here(evaluator, [1])
    first = library(evaluator, tmp_path, cast("Pool", pool), 1, ["latency[cpu]"], Progress(None))
    assert not (tmp_path / LIBRARY).exists()
    lost = {name for name, reason in first.left_out.items() if reason == "out of memory"}
    assert lost
    for choice, errors in zip(first.space.choices, first.option_errors, strict=True):
        if choice.name in lost:
            assert list(errors) == [0.0, *[1.0] * (len(choice.options) - 1)]
    asked = pool.asked
    pool.failing.clear()
    second = library(evaluator, tmp_path, cast("Pool", pool), 1, ["latency[cpu]"], Progress(None))
    assert pool.asked == 2 * asked
    assert (tmp_path / LIBRARY).exists()
    assert not lost & set(second.left_out)
    library(evaluator, tmp_path, cast("Pool", pool), 1, ["latency[cpu]"], Progress(None))
    assert pool.asked == 2 * asked
