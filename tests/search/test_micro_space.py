"""The search on a space whose every network is known."""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def judge() -> Any:
    """The benchmark's module, found as the benchmark finds it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("micro_judge")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_stored_networks_are_all_there_and_make_sense(judge: Any) -> None:
    micro = judge.load()
    assert micro.accuracy.shape == (6,) * 6
    assert micro.accuracy[(0,) * 6] > 0.98
    assert micro.divergence[(0,) * 6] == 0
    assert micro.ratio[(0,) * 6] == 1
    assert micro.ratio.min() > 0
    # What is far from the original answers worse.
    near, far = micro.divergence < 0.05, micro.divergence > 1
    assert micro.accuracy[near].mean() > micro.accuracy[far].mean() + 0.2
    every = np.stack([1 - micro.accuracy.ravel(), micro.ratio.ravel()], 1)
    assert judge.volume(every) == pytest.approx(micro.best)


def test_the_volume_is_that_of_the_boxes(judge: Any) -> None:
    # Two boxes that overlap: 0.9 x 0.2 and 0.5 x 0.6 share 0.5 x 0.2; a dominated third adds nothing.
    rows = np.array([[0.1, 0.8], [0.5, 0.4], [0.6, 0.9]])
    assert judge.volume(rows) == pytest.approx(0.9 * 0.2 + 0.5 * 0.6 - 0.5 * 0.2)


def test_after_60_charged_evaluations_less_than_one_percent_is_missing(judge: Any) -> None:
    micro = judge.load()
    missing = judge.regrets(micro, "planish", 0, 60)
    assert len(missing) == 61
    assert all(later <= earlier for earlier, later in pairwise(missing))
    assert missing[60] <= 0.01
