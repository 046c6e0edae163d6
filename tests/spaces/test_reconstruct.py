"""Layers refitted in a compressed model: against least squares by hand, and what it gives back."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.spaces.apply import apply
from planish.spaces.propose import propose
from planish.spaces.reads import places, reads_of
from planish.spaces.reconstruct import RIDGE, reconstruct, reference_of
from planish.spaces.space import Candidate, Kind
from planish.spaces.trace import trace

if TYPE_CHECKING:
    from tests.spaces.conftest import Net

LAYERS = [
    (nn.Conv2d(3, 5, 3, padding=1), (3, 9, 11)),
    (nn.Conv2d(3, 5, (1, 5), stride=(2, 1), padding=(0, 2)), (3, 8, 10)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), (4, 9, 9)),
    (nn.Conv2d(4, 6, 1), (4, 5, 5)),
    (nn.Linear(7, 3), (7,)),
    (nn.Linear(7, 3), (6, 7)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("count", [20, 10**6])
def test_what_is_read_times_the_weights_is_what_is_returned(
    layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], count: int
) -> None:
    value = torch.randn(4, *shape)
    found = reads_of(layer, value.contiguous(memory_format=torch.channels_last) if len(shape) == 3 else value, count)
    assert found is not None
    assert layer.bias is not None
    with torch.no_grad():
        output = layer(value)
        rows = output.transpose(0, 1).flatten(1) if output.ndim == 4 else output.reshape(-1, output.shape[-1]).T
        wanted = rows[:, places(rows.shape[1], count)]
        assert torch.allclose(layer.weight.flatten(1) @ found + layer.bias[:, None], wanted, atol=1e-5)


def test_what_is_read_otherwise_is_left_out() -> None:
    assert reads_of(nn.Conv2d(4, 4, 3, groups=4), torch.randn(2, 4, 6, 6), 10) is None
    assert reads_of(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 6, 6), 10) is None


class Pair(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.last = nn.Linear(6 * 64, 4)

    def between(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.two(self.between(x)).flatten(1))
        return result


def test_a_layer_is_moved_to_the_least_squares_of_what_it_reads_now() -> None:
    torch.manual_seed(0)
    model, inputs = Pair().eval(), torch.randn(64, 3, 8, 8)
    other = copy.deepcopy(model)
    reference = reference_of(trace(model, inputs), inputs)
    with torch.no_grad():
        other.one.weight[:3] *= 0.2
        wanted = model.two(model.between(inputs)).transpose(0, 1).flatten(1).double()
        lost = float((other.one.weight - model.one.weight).norm())
    reconstruct(other, reference, {}, {})
    # The first layer reads what it read, and is moved to what it was.
    assert float((other.one.weight - model.one.weight).detach().norm()) < 0.2 * lost
    with torch.no_grad():
        reads = F.unfold(other.between(inputs), 3, padding=1).transpose(0, 1).flatten(1).double()
        found = other.two(other.between(inputs)).transpose(0, 1).flatten(1).double()
    centred, missing = reads - reads.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)
    covariance = centred @ centred.T / reads.shape[1]
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    old = model.two.weight.detach().flatten(1).double()
    step = (missing - old @ centred) @ centred.T / reads.shape[1] @ torch.linalg.inv(covariance)
    assert torch.allclose(other.two.weight.detach().flatten(1).double(), old + step, atol=2e-3)
    # The bias takes the mean up.
    assert torch.allclose(found.mean(1), wanted.mean(1), atol=2e-2)


def test_a_model_that_did_not_change_stays_as_it_is(net: Net) -> None:
    module = copy.deepcopy(net.traced.module)
    reconstruct(module, reference_of(net.traced, net.calibration), {}, {})
    for (name, one), (_, other) in zip(module.named_parameters(), net.traced.module.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4), name


def test_it_gives_back_a_good_part_of_what_pruning_and_rank_lose(nets: dict[str, Net]) -> None:
    net = nets["resnet"]
    proposal = propose(net.traced, lanes=4)
    options = {
        choice.name: choice.options[2 if len(choice.options) > 2 else -1]
        for choice in proposal.space.choices
        if choice.kind in (Kind.PRUNE, Kind.RANK)
    }
    candidate = Candidate({**proposal.space.original().options, **options})

    def lost(module: nn.Module) -> float:
        with torch.no_grad():
            wanted = net.traced.module(net.calibration)
            return float((module(net.calibration) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())

    found = lost(apply(candidate, net.traced, proposal, net.calibration))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("planish.spaces.apply"), "reconstruct", lambda *given: None)
        alone = lost(apply(candidate, net.traced, proposal, net.calibration))
    assert found < 0.7 * alone
