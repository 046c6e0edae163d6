"""A mistake of the user's gets one clear line and exit code 2, and costs nothing."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.end_to_end.small_search import OWN, prepare

from planish.search.cli import main

_MODELS = """
import torch
from torch import nn


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        y = self.fc(x.flatten(1))
        if y.sum() > 0:
            y = y + 1
        return y


def untraceable():
    return Branching().eval()


def plain():
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10)).eval()


def empty():
    x, y = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)
    return (x, y), (x, y), (x, y)


def wrong_shape():
    x, y = torch.zeros(20, 3, 8, 8), torch.arange(20) % 10
    return (x, y), (x, y), (x, y)
"""


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil-was-here",)


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    prepare(folder)
    return folder


@pytest.fixture
def models(tmp_path: Path, own_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(own_files, tmp_path, dirs_exist_ok=True)
    (tmp_path / "models.py").write_text(_MODELS, encoding="utf-8")
    return tmp_path / "models.py"


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command says when it ends with exit code 2."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("planish: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_an_unknown_key_names_the_nearest_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text('model = "digits-resnet"\ndata = "digits32"\nbudgets = "latency<=0.5x"\n', encoding="utf-8")
    assert "'budget'" in one_line(capsys, "search", spec)


def test_an_untraceable_model_names_the_operation_and_its_line(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line(capsys, "search", "--model", f"{models}:untraceable", "--data", f"{OWN}:data", "--out", "run")
    assert "models.py:13" in line
    assert not Path("run").exists()


def test_weights_that_do_not_fit_name_the_first_tensors(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"0.weight": torch.zeros(3)}, "weights.pt")
    line = one_line(
        capsys, "search", "--model", f"{models}:plain", "--data", f"{OWN}:data", "--weights", "weights.pt", "--out", "r"
    )
    assert "0.bias" in line


def test_a_pickle_with_code_is_refused_and_never_run(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("weights.pt").write_bytes(pickle.dumps({"0.weight": _Evil()}))
    line = one_line(
        capsys, "search", "--model", f"{models}:plain", "--data", f"{OWN}:data", "--weights", "weights.pt", "--out", "r"
    )
    assert "weights.pt" in line
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize(("factory", "said"), [("empty", "sample"), ("wrong_shape", "shape")])
def test_data_that_do_not_fit_say_what_they_are(
    models: Path, capsys: pytest.CaptureFixture[str], factory: str, said: str
) -> None:
    line = one_line(capsys, "search", "--model", f"{models}:plain", "--data", f"{models}:{factory}", "--out", "run")
    assert said in line


@pytest.mark.parametrize(
    ("device", "said"),
    [("fpga/ecp5-85k", "not usable here"), ("cpuu", "'cpu'"), ("cpu?threads=9999", "threads"), ("x.toml", "x.toml")],
)
def test_a_device_that_is_not_usable_says_what_is_missing(
    models: Path, capsys: pytest.CaptureFixture[str], device: str, said: str
) -> None:
    line = one_line(
        capsys, "search", "--model", f"{models}:plain", "--data", f"{OWN}:data", "--device", device, "--out", "run"
    )
    assert said in line


def test_a_budget_out_of_reach_states_the_range_and_keeps_what_was_measured(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line(
        capsys, "search", "--model", f"{models}:plain", "--data", f"{OWN}:data", "--budget", "size<=10B",
        "--out", "run", "--workers", 1, "--set", "measure.runs=3", "--set", "measure.processes=1",
    )  # fmt: skip
    assert "size<=10B" in line
    assert "x to 1x" in line
    assert np.isfinite(os.path.getsize("run/front.json"))


def test_a_folder_that_is_no_artifact_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "manifest.json" in one_line(capsys, "bench", tmp_path)
