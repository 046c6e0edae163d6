"""Compression of a trained network: the closed forms must keep its accuracy, not only its shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planish.spaces import Candidate, Choice, Kind, Option
from planish.spaces.apply import apply
from planish.spaces.propose import Proposal, propose
from planish.spaces.trace import TracedModel, trace

if TYPE_CHECKING:
    from tests.spaces.conftest import Net

pytestmark = pytest.mark.data
Trained = tuple[TracedModel, Proposal, Tensor, Tensor, float]


@pytest.fixture(scope="module")
def trained(data_folder: Path, nets: dict[str, Net]) -> Trained:
    """A trained ResNet-20, its space, normalised test images (1000, 3, 32, 32), labels, accuracy on the last 400."""
    model = nets["resnet20"].model.__class__(3, (16, 32, 64), False)
    weights = torch.load(data_folder / "weights" / "cifar10_resnet20.pt", weights_only=True)
    model.load_state_dict(weights)
    data = np.load(data_folder / "cifar10" / "cifar10_test_first1000.npz", allow_pickle=False)
    mean, spread = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (torch.from_numpy(data["images"]).float() / 255 - mean) / spread
    traced = trace(model.eval(), images)
    labels = torch.from_numpy(data["labels"].astype(np.int64))
    return traced, propose(traced), images, labels, accuracy(traced.module, images[600:], labels[600:])


def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        guesses = torch.cat([module(part) for part in images.chunk(4)]).argmax(1)
    return float((guesses == labels).double().mean())


@pytest.mark.parametrize(
    ("pick", "lost"),
    [
        (lambda c: 8 if c.kind is Kind.BITS else None, 0.015),
        (lambda c: 16 if c.kind is Kind.CLUSTER else None, 0.025),
        (lambda c: 0.25 if c.kind is Kind.PRUNE and 0.25 in c.options else None, 0.04),
    ],
)
def test_mild_compression_without_training_loses_little(
    trained: Trained, pick: Callable[[Choice], Option], lost: float
) -> None:
    traced, proposal, images, labels, before = trained
    candidate = Candidate({choice.name: pick(choice) for choice in proposal.space.choices})
    assert candidate != proposal.space.original()
    module = apply(candidate, traced, proposal, images[:128])
    assert before > 0.9
    # 400 images: if 2 % of them change sides at random, two standard errors of the difference are 0.014.
    assert accuracy(module, images[600:], labels[600:]) > before - lost
