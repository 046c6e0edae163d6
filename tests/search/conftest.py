"""A finished run of a model so small that TVM compiles it in a second or two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish.compilers.tvm_compiler import TvmCompiler
from planish.hwmodels.device import parse_device
from planish.search.artifact_path import artifact_path
from planish.search.config import load_spec
from planish.search.data import Data, Normalise, Split
from planish.search.front import Entry, front_document
from planish.search.objective import objectives_of
from planish.search.rundir import RunDirectory
from planish.search.task_note import write_task
from planish.search.tasks import Task
from planish.search.tensor_file import write_tensors
from planish.search.trial import State, Trial
from planish.spaces import Choice, Kind, SearchSpace

SPACE = SearchSpace((Choice("0", Kind.PRUNE, (0.0, 0.25, 0.5, 0.75)),), {})
# What a C++ literal and a terminal might trip over.
CLASSES = ('say "70"', "back\\slash ??/", "Grüße 猫", "%s%n 7")


def _module(channels: int) -> nn.Module:
    torch.manual_seed(channels)
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 64, len(CLASSES))
    ).eval()


def _data() -> Data:
    inputs = torch.randint(0, 256, (8, 2, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    normalise = Normalise(1 / 255, (0.4, 0.6), (0.2, 0.3))
    part = Split(inputs, torch.arange(8) % len(CLASSES), normalise)
    return Data(part, part, part, CLASSES)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Artifacts `original` and `smaller`, and their `task`: compiled once, a test that changes one copies it first."""
    device, folder = parse_device("cpu"), tmp_path_factory.mktemp("artifacts")
    compiler = TvmCompiler()
    if missing := compiler.missing(device):
        pytest.skip(missing)
    task = Task(_module(16), _data(), "tiny")
    examples = task.data.validation.batch(slice(0, 3)).unsqueeze(1)
    for name, module in (("original", task.model), ("smaller", _module(4))):
        program = torch.export.export(module, (examples[0],))
        compiler.compile(program, device, folder / name, examples, tolerance=1e-3)
    return SimpleNamespace(original=folder / "original", smaller=folder / "smaller", task=task)


def _metrics(accuracy: float, labels: tuple[str, ...], latency_s: float) -> Mapping[str, object]:
    return {
        "accuracy": accuracy,
        "accuracy_ci95": [accuracy - 0.01, accuracy + 0.01],
        "latency_s": {label: {"value": latency_s, "ci95": [latency_s, latency_s]} for label in labels},
        "latency_ratio": dict.fromkeys(labels, latency_s / 1e-3),
        "size_bytes": 1000,
    }


@pytest.fixture(scope="session")
def make_run(models: SimpleNamespace) -> Callable[[Path, tuple[str, ...]], Path]:
    """Makes a run for devices: its trials 1 and 2 are on the front, 3 is beaten and 4 stopped; 0 is the original."""
    return lambda path, devices: _write_run(path, models, devices)


@pytest.fixture
def run(make_run: Callable[[Path, tuple[str, ...]], Path], tmp_path: Path) -> Path:
    """`make_run` for one device."""
    return make_run(tmp_path / "run", ("cpu",))


def _write_run(path: Path, models: SimpleNamespace, devices: tuple[str, ...]) -> Path:
    spec = load_spec(None, {"model": "m", "data": "d", "device": list(devices), "budget": "latency<=0.6x"})
    labels = spec.labels()
    values = [(0.9, 1e-3), (0.88, 5e-4), (0.8, 2e-4), (0.7, 9e-4)]
    trials = [
        Trial(n, SPACE.decode([n % 4]), State.COMPLETE, _metrics(a, labels, s), None, n)
        for n, (a, s) in enumerate(values)
    ]
    with RunDirectory.create(path, spec, {}) as run:
        for trial in trials:
            run.append(trial)
            folder = run.trial_folder(trial.number)
            source = models.smaller if trial.number else models.original
            for label in labels:
                shutil.copytree(source, artifact_path(folder, labels, label))
            write_tensors(folder / "weights.safetensors", {"w": torch.zeros(3)}, {"options": {}})
            folder.joinpath("recipe.json").write_text(json.dumps({"recipe": {"epochs": 6} if trial.number else None}))
        run.append(Trial(4, SPACE.decode([1]), State.STOPPED, {}, None, 4))
        original, *entries = [Entry(t, True, {"epochs": 6} if t.number else None) for t in trials]
        bounds = [budget.resolve(original.trial.metrics) for budget in spec.budgets()]
        run.write_front(front_document(objectives_of(["accuracy", "latency"], labels), bounds, original, entries))
        write_task(path, models.task)
    return path
