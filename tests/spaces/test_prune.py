"""Which channels go, and what the next layer does about it."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from planish.spaces.coupling import couple
from planish.spaces.moments import Moments, fit
from planish.spaces.prune import Group, absorb, choose_channels, consumer_pixels, kept_channels, left_channels, narrow
from planish.spaces.trace import TracedModel, trace

if TYPE_CHECKING:
    from tests.spaces.conftest import Net


@pytest.mark.parametrize("width", range(1, 600, 7))
def test_a_fraction_gives_back_the_number_of_channels_it_was_made_of(width: int) -> None:
    assert all(kept_channels(width, (width - keep) / width) == keep for keep in range(1, width + 1))


def two_layers(width: int, seed: int = 0) -> tuple[TracedModel, Group, Tensor]:
    """A linear layer, a nonlinearity and another linear layer; the group between them, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5))
        inputs = torch.randn(400, 6)
    traced = trace(model, inputs)
    (group,) = couple(traced).groups
    return traced, group, inputs


def refitted_error(traced: TracedModel, gone: tuple[int, ...], inputs: Tensor) -> float:
    """The least squared output error without some hidden channels, by a least-squares solve of the last layer."""
    with torch.no_grad():
        hidden = torch.tanh(traced.module.get_submodule("0")(inputs)).double()
        want = traced.module(inputs).double()
    rows = torch.cat([hidden[:, [c for c in range(hidden.shape[1]) if c not in gone]], torch.ones(len(hidden), 1)], 1)
    solution = torch.linalg.lstsq(rows, want).solution
    return float((rows @ solution - want).square().sum())


def test_the_first_channel_to_go_is_the_one_that_the_others_replace_best() -> None:
    traced, group, inputs = two_layers(8)
    moments = fit(traced, {"2": 1}, inputs).moments
    kept = choose_channels(traced.module, group, 7, moments)
    errors = [refitted_error(traced, (c,), inputs) for c in range(8)]
    assert set(range(8)) - set(kept.tolist()) == {errors.index(min(errors))}


def test_greedy_removal_is_near_the_best_subset() -> None:
    traced, group, inputs = two_layers(8)
    kept = choose_channels(traced.module, group, 5, fit(traced, {"2": 1}, inputs).moments)
    gone = tuple(sorted(set(range(8)) - set(kept.tolist())))
    every = sorted(refitted_error(traced, subset, inputs) for subset in itertools.combinations(range(8), 3))
    assert refitted_error(traced, gone, inputs) <= every[len(every) // 10]


def test_narrowing_with_moments_reaches_the_least_squares_error() -> None:
    traced, group, inputs = two_layers(8)
    keep = torch.tensor([0, 2, 3, 5, 7])
    smaller = copy.deepcopy(traced.module)
    narrow(smaller, [(group, keep)], fit(traced, {"2": 1}, inputs).moments)
    with torch.no_grad():
        error = float((smaller(inputs) - traced.module(inputs)).double().square().sum())
    best = refitted_error(traced, (1, 4, 6), inputs)
    assert best <= error <= 1.02 * best  # the ridge costs less than two per cent


def test_channels_that_repeat_others_are_removed_for_nothing() -> None:
    traced, group, inputs = two_layers(12)
    with torch.no_grad():
        for tensor in traced.module.get_submodule("0").parameters():
            tensor[6:] = tensor[:6]
    moments = fit(traced, {"2": 1}, inputs).moments
    keep = choose_channels(traced.module, group, 6, moments)
    smaller = copy.deepcopy(traced.module)
    narrow(smaller, [(group, keep)], moments)
    with torch.no_grad():
        change = (smaller(inputs) - traced.module(inputs)).norm() / traced.module(inputs).norm()
    assert {int(c) % 6 for c in keep} == set(range(6))
    assert change < 1e-2  # the ridge


def test_without_moments_small_weights_go_first() -> None:
    traced, group, _ = two_layers(8)
    with torch.no_grad():
        traced.module.get_parameter("0.weight")[[1, 6]] *= 1e-3
        traced.module.get_parameter("2.weight")[:, [1, 6]] *= 1e-3
    assert choose_channels(traced.module, group, 6, {}).tolist() == [0, 2, 3, 4, 5, 7]


def test_many_channels_go_several_at_a_time_without_repeats() -> None:
    traced, group, inputs = two_layers(256)
    kept = choose_channels(traced.module, group, 100, fit(traced, {"2": 1}, inputs).moments)
    assert len(set(kept.tolist())) == 100
    assert kept.tolist() == sorted(kept.tolist())


def test_absorbing_solves_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1
    moments = Moments(x.mean(0), torch.cov(x.T, correction=0), torch.ones(1, 1))
    weight = torch.randn(3, 6, generator=generator)
    keep, gone = torch.tensor([0, 1, 4]), torch.tensor([2, 3, 5])
    changed, missing = absorb(weight[..., None], keep, gone, moments)
    rows = torch.cat([x[:, keep], torch.ones(500, 1)], 1)
    exact = torch.linalg.lstsq(rows, x @ weight.T).solution
    assert torch.allclose(changed[..., 0].T, exact[:3], rtol=0.05, atol=0.05)  # the ridge
    got = x[:, keep] @ changed[..., 0].T + missing
    assert torch.allclose(got.mean(0), (x @ weight.T).mean(0), atol=1e-4)


def test_pixels_behind_a_flatten_are_counted_and_channels_read_back(nets: dict[str, Net]) -> None:
    groups = couple(nets["mobile"].traced).groups
    assert consumer_pixels(groups)["fc1"] == 4
    assert consumer_pixels(groups)["head"] == 1
    kept = [(g, torch.arange(0, g.width, 2)) for g in groups if g.site in ("left", "right", "head")]
    assert left_channels(kept, "head", "in", 80).tolist() == list(range(0, 80, 2))
    assert left_channels(kept, "fc1", "in", 64).tolist() == list(range(0, 64, 2))
