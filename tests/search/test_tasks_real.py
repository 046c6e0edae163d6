"""The published models on the real data: what they score is known."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from planish.search.data import Normalise, Split
from planish.search.data_augment import Augment
from planish.search.data_sources import load_data
from planish.search.models import load_model
from planish.search.score import accuracy, recalibrate
from planish.search.tasks import load_task

pytestmark = pytest.mark.data


def first_1000(folder: Path) -> Split:
    file = folder / "cifar10" / "cifar10_test_first1000.npz"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    members = np.load(file, allow_pickle=False)
    normalise = Normalise(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Split(torch.from_numpy(members["images"]), torch.from_numpy(members["labels"]).long(), normalise)


@pytest.mark.parametrize(("depth", "right"), [(20, 915), (56, 926)])
def test_the_published_resnets_score_on_the_first_thousand_test_images(
    data_folder: Path, depth: int, right: int
) -> None:
    model = load_model(f"cifar10-resnet{depth}", str(data_folder / "weights" / f"cifar10_resnet{depth}.pt"), seed=0)
    result = accuracy(model, first_1000(data_folder))
    # Another order of summation may turn a sample whose two best logits are nearly equal.
    assert abs(int(result.correct.sum()) - right) <= 1


def test_a_resnet_recalibrated_on_calibration_inputs_stays_what_it_was(data_folder: Path) -> None:
    model = load_model("cifar10-resnet20", str(data_folder / "weights" / "cifar10_resnet20.pt"), seed=0)
    part = first_1000(data_folder)
    before = accuracy(model, part).value
    # As in training. Without the shifts the same 512 images cost three points.
    recalibrate(model, replace(part, augment=Augment(shift=4, flip=True)).calibration(512))
    assert abs(accuracy(model, part).value - before) <= 0.01


def test_keyword_spotting_scores_what_was_measured(data_folder: Path) -> None:
    weights = str(data_folder / "weights" / "kws_dscnn.pt")
    task = load_task("kws-dscnn", f"kws:{data_folder / 'kws'}", weights)
    parts = task.data.splits().values()
    right = sum(int(accuracy(task.model, part).correct.sum()) for part in parts)
    assert sum(len(part) for part in parts) == 1000
    assert abs(right - 913) <= 1


def test_the_small_fashion_file_is_balanced_and_normalised(data_folder: Path) -> None:
    data = load_data(f"fashion-mnist:{data_folder / 'fashion-mnist'}")
    assert [len(part) for part in data.splits().values()] == [18_000, 2000, 5000]
    assert data.train.targets.bincount().tolist() == [1800] * 10
    example = data.example(18_000)
    assert abs(float(example.mean())) < 0.01
    assert abs(float(example.std()) - 1) < 0.01


@pytest.mark.slow
def test_the_whole_of_cifar_decodes_exactly_and_resnet20_scores_as_published(data_folder: Path) -> None:
    weights = str(data_folder / "weights" / "cifar10_resnet20.pt")
    task = load_task("cifar10-resnet20", f"cifar10:{data_folder / 'cifar10'}", weights)
    pixels = hashlib.sha256(task.data.test.inputs.contiguous().numpy().tobytes()).hexdigest()
    assert pixels == "ed893735ff82c0178f2cd31343a1d5ab993eeae4f3b919d9c1436789336729f1"
    labels = hashlib.sha256(task.data.test.targets.to(torch.uint8).numpy().tobytes()).hexdigest()
    assert labels == "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5"
    assert task.data.validation.targets.bincount().tolist() == [500] * 10
    assert accuracy(task.model, task.data.test).value == pytest.approx(0.9173, abs=0.0002)
