"""Errors of options to first order, against what building the candidate does to a model's outputs."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from planish.spaces import local_error
from planish.spaces.apply import apply
from planish.spaces.local_error import local_errors
from planish.spaces.propose import propose
from planish.spaces.space import Candidate, Kind
from planish.spaces.trace import trace


class Straight(nn.Module):
    """Linear in its input, so that first order is all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(8, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.two(self.one(x)).mean((2, 3)))
        return y


class Normed(nn.Module):
    """A batch norm behind a convolution takes back what an option does to means and variances."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return y


def moved(model: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """The mean squared change of the outputs, without what all classes share, over the outputs' variance."""
    with torch.no_grad():
        before, after = model(inputs), other(inputs)
    change = after - before
    change = change - change.mean(1, keepdim=True)
    return float(change.square().sum() / (before - before.mean(0)).square().sum())


def smooth(count: int, seed: int) -> Tensor:
    """Inputs whose channels and pixels are alike, as those of real layers are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 8, 12, 12, generator=generator)
    mixed = torch.einsum("nchw,cd->ndhw", noise, torch.randn(8, 8, generator=generator))
    return nn.functional.avg_pool2d(mixed, 5, stride=1)


def test_in_a_linear_model_the_error_is_what_the_option_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Alone: without what other layers make up for.
    monkeypatch.setattr(import_module("planish.spaces.apply"), "reconstruct", lambda *given: None)
    torch.manual_seed(0)
    inputs = smooth(256, 1)
    traced = trace(Straight(), inputs[:1])
    proposal = propose(traced, lanes=4)
    found = local_errors(traced, proposal, inputs)
    assert not found.failed
    original = proposal.space.original()
    checked = set()
    for choice in proposal.space.choices:
        assert found.errors[choice.name][0] == 0
        for level, option in enumerate(choice.options[1:], start=1):
            other = apply(Candidate({**original.options, choice.name: option}), traced, proposal, inputs)
            # 1024 random directions: the estimate is within 4 standard deviations of 4 % each. Rounding of bits in
            # one layer changes the inputs' statistics by nothing.
            wanted = moved(traced.module, other, inputs)
            assert found.errors[choice.name][level] == pytest.approx(wanted, rel=0.2, abs=1e-7), (choice.name, option)
            checked.add(choice.kind)
    assert checked == set(Kind)


def test_what_a_batch_norm_takes_back_does_not_count() -> None:
    torch.manual_seed(0)
    model = Normed()
    inputs = smooth(256, 2)
    with torch.no_grad():
        for _ in range(60):
            model.train()(inputs)
    traced = trace(model.eval(), inputs[:1])
    proposal = propose(traced, lanes=4)
    found = local_errors(traced, proposal, inputs, [c for c in proposal.space.choices if c.site == "conv"])
    original = proposal.space.original()
    pairs = []
    for choice in proposal.space.choices:
        if choice.site == "conv":
            for level, option in enumerate(choice.options[1:], start=1):
                other = apply(Candidate({**original.options, choice.name: option}), traced, proposal, inputs)
                pairs.append((found.errors[choice.name][level], moved(traced.module, other, inputs)))
    assert len(pairs) >= 12
    # The order is what counts; second order and the relu leave the sizes apart.
    guessed, real = zip(*pairs, strict=True)
    assert spearmanr(guessed, real).statistic > 0.9


def test_an_error_is_that_of_all_images_however_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, what moves an image's own means would pass for a shift that a batch norm takes back."""
    torch.manual_seed(0)
    traced = trace(Normed().eval(), smooth(1, 1))
    proposal, inputs = propose(traced, lanes=8), smooth(48, 2)
    found = []
    for values in (2**24, 1):
        monkeypatch.setattr(local_error, "_VALUES", values)
        # Random signs differ from batch to batch: enough of them, that errors are exact up to a few percent.
        monkeypatch.setattr(local_error, "PROBES", 64)
        found.append(local_errors(traced, proposal, inputs).errors)
    together, alone = found
    assert together.keys() == alone.keys()
    for name, errors in together.items():
        assert alone[name] == pytest.approx(errors, rel=0.12), name


def test_what_cannot_be_built_is_infinite_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = smooth(32, 3)
    traced = trace(Straight(), inputs[:1])
    proposal = propose(traced, lanes=4, families=(Kind.RANK,))

    def broken(*_: object) -> None:
        raise RuntimeError("no such factor")

    monkeypatch.setattr("planish.spaces.local_error.factorise_site", broken)
    found = local_errors(traced, proposal, inputs)
    assert all(error == float("inf") for errors in found.errors.values() for error in errors[1:])
    assert all("no such factor" in reason for reason in found.failed.values())


class Activated(nn.Module):
    """Activations and sums right behind layers, which may be written in the place of what those return."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.one, self.two = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu(self.one(x), inplace=self.inplace)
        z = self.two(y)
        if self.inplace:
            z += y
        else:
            z = z + y
        logits: Tensor = self.fc(z.mean((2, 3)))
        return logits


def test_what_is_written_in_place_behind_a_layer_changes_no_error() -> None:
    inputs, found = smooth(48, 0), []
    for inplace in (False, True):
        torch.manual_seed(0)
        traced = trace(Activated(inplace), inputs)
        proposal = propose(traced, lanes=8, families=(Kind.BITS, Kind.RANK, Kind.PRUNE))
        found.append(local_errors(traced, proposal, inputs).errors)
    assert found[0].keys() == found[1].keys()
    for name, errors in found[0].items():
        assert errors == pytest.approx(found[1][name], rel=1e-4)
