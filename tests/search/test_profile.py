"""`planish profile` of a small model: what it says of the device, and that it compiles nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.compilers.compiler import CompileError
from planish.search import latency_table, profile, table_measuring
from planish.search.config import Spec, load_spec
from planish.search.errors import UserError
from planish.search.evaluate import Evaluator, Job
from planish.search.progress import Progress
from planish.search.table_measuring import TableLimits

pytestmark = pytest.mark.tvm

LIMITS = TableLimits(candidates=8, least=8, build_s=60.0, kernels=12, kernel_s=0.3, network_s=0.3)
OWN = """
import numpy as np, torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()

def data():
    rng = np.random.default_rng(0)
    return tuple((rng.normal(size=(16, 3, 12, 12)).astype("float32"), np.arange(16) % 4) for _ in range(3))
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """Of a model in a user's file, on a machine that is free, with a cache of its own."""
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    for module in (latency_table, profile):
        monkeypatch.setattr(module, "wait_for_quiet", lambda threads: None)
    for module in (table_measuring, profile):
        monkeypatch.setattr(module, "refuse_loaded", lambda watch, device: None)
    monkeypatch.setattr(latency_table, "refuse_disturbed", lambda quiet, name, slower: None)
    own = tmp_path / "own.py"
    return load_spec(None, {"model": f"{own}:model", "data": f"{own}:data", "measure.runs": 3})


def test_the_corners_are_compiled_once_and_timed_by_the_table(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = table_measuring.compiled
    folders: list[str] = []

    def counting(evaluator: Any, label: str, program: Any, folder: Path) -> Path:
        folders.append(folder.name)
        return compiled(evaluator, label, program, folder)

    monkeypatch.setattr(table_measuring, "compiled", counting)
    found: dict[str, Any] = profile.profile(spec, Progress(None), limits=LIMITS)
    device = found["devices"]["cpu"]
    assert device["latency_model"]["failed"] == {}
    # 8 candidates, of which the profile had compiled the original and the corners.
    assert 0 < len(set(folders)) == len(folders) <= 5
    low, high = device["reachable"]["latency_s"]
    assert 0 < low < device["latency_s"] <= high
    assert device["latency_ci95"][0] <= device["latency_s"] <= device["latency_ci95"][1]
    assert [row["site"] for row in device["layers"]] == ["0", "2", "6"]
    measured = sum(row["time_s"] for row in device["layers"]) + device["other_time_s"]
    assert np.isclose(sum(row["share"] for row in device["layers"]), 1 - device["other_time_s"] / measured)
    low_bytes, bytes_ = device["reachable"]["size_bytes"]
    assert bytes_ == 4 * sum((3 * 32 * 9 + 32, 32 * 32 * 9 + 32, 32 * 4 + 4))
    assert low_bytes < bytes_ / 8
    assert {row["option"] for row in device["gains"]} >= {8, 4}


def test_without_a_table_the_corners_are_timed_beside_the_original(spec: Spec) -> None:
    found: dict[str, Any] = profile.profile(spec, Progress(None), table=False)
    device = found["devices"]["cpu"]
    assert "latency_model" not in device
    low, high = device["reachable"]["latency_s"]
    assert 0 < low < device["latency_s"] <= high


@pytest.mark.parametrize("number", [0, 1])
def test_a_corner_that_cannot_be_compiled_is_left_out_and_the_original_must_be(
    spec: Spec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    compiled = Evaluator.compile

    def refusing(self: Evaluator, module: Any, job: Job, *rest: Any) -> Any:
        if job.number == number:
            raise CompileError("no such operator\nat line 7")
        return compiled(self, module, job, *rest)

    monkeypatch.setattr(Evaluator, "compile", refusing)
    if number == 0:
        with pytest.raises(UserError, match=r"^the model as it is cannot be compiled: no such operator$"):
            profile.profile(spec, Progress(None), table=False)
        return
    found: dict[str, Any] = profile.profile(spec, Progress(None), table=False)
    assert found["devices"]["cpu"]["latency_s"] > 0
    assert "cannot be compiled and is left out: no such operator" in caplog.text
