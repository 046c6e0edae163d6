"""Rounding that looks at outputs: against rounding to the nearest, and against every way to round."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from tests.spaces.test_blocks import moments_of, smooth
from torch import nn

from planish.spaces.compensate import compensate
from planish.spaces.moments import Moments
from planish.spaces.quantize import Quantized, Range
from planish.spaces.stages import quantised

SEEN = Range(-4.0, 4.0)
BLURRED = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]) / 9  # taps of a mean over 3 x 3 pixels


def steps_of(layer: Quantized) -> torch.Tensor:
    """Weights in steps of the layer's scale."""
    weight = layer.inner.weight.detach()
    return weight / layer.weight_scale(weight).reshape(-1, *[1] * (weight.ndim - 1))


def output_error(layer: Quantized, exact: nn.Conv2d, x: torch.Tensor) -> float:
    """What rounded weights alone do to the outputs, on inputs as they are."""
    weight = layer.inner.weight.detach()
    whole = layer.integer().weight * layer.weight_scale(weight).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        want = exact(x)
        got = nn.functional.conv2d(x, whole, layer.inner.bias, padding=1)
        return float((got - want)[..., 1:-1, 1:-1].square().mean() / want.var())


@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_nearer_than_with_the_nearest_weights(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(12, 16, 3, padding=1)
    conv.weight.data = torch.randn(16, 12, 3, 3, generator=generator)
    x = smooth(12, generator)
    fitted, unseen = x[:24], x[24:]
    nearest = quantised(copy.deepcopy(conv), 4, SEEN)
    better = quantised(copy.deepcopy(conv), 4, SEEN, moments_of(fitted, BLURRED))
    assert isinstance(nearest, Quantized)
    assert isinstance(better, Quantized)
    assert output_error(better, conv, unseen) < 0.5 * output_error(nearest, conv, unseen)


def test_weights_are_on_the_grid_that_the_layer_computes_with() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Quantized(nn.Conv2d(6, 8, 3, padding=1), 4, SEEN)
    compensate(layer, moments_of(smooth(6, generator), BLURRED))
    steps = steps_of(layer)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert float(steps.abs().max()) <= 7 + 1e-4
    assert torch.equal(layer.integer().weight, steps.round().to(torch.int8))


def test_inputs_that_are_independent_leave_nothing_to_take_up() -> None:
    linear = nn.Linear(5, 7)
    layer, plain = Quantized(copy.deepcopy(linear), 4, SEEN), Quantized(copy.deepcopy(linear), 4, SEEN)
    compensate(layer, Moments(torch.zeros(5), torch.eye(5), torch.ones(1, 1)))
    assert torch.equal(layer.integer().weight, plain.integer().weight)
    assert layer.inner.bias is not None
    assert torch.allclose(layer.inner.bias, linear.bias, atol=1e-6)


def test_inputs_that_are_alike_are_rounded_nearly_as_well_as_any_choice_of_up_and_down_does() -> None:
    covariance = 0.1 * torch.eye(6) + 0.9
    linear = nn.Linear(6, 64, bias=False)
    linear.weight.data = torch.rand(64, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    layer = Quantized(copy.deepcopy(linear), 4, SEEN)
    scale = layer.weight_scale(linear.weight.detach())[:, None]
    compensate(layer, Moments(torch.zeros(6), covariance, torch.ones(1, 1)))

    def error(whole: torch.Tensor) -> torch.Tensor:
        d = whole * scale - linear.weight.detach()
        return torch.einsum("oi,ij,oj->o", d, covariance, d)

    exact = linear.weight.detach() / scale
    ways = [torch.floor(exact) + torch.tensor(up) for up in product((0.0, 1.0), repeat=6)]
    best = torch.stack([error(way.clamp(-7, 7)) for way in ways]).amin(0)
    own, nearest = error(layer.integer().weight.float()), error(exact.round().clamp(-7, 7))
    assert float(own.sum()) < 0.5 * float(nearest.sum())
    assert float(own.sum()) < 1.5 * float(best.sum())


def test_the_mean_of_the_input_moves_no_output() -> None:
    moments = Moments(torch.tensor([3.0, -2.0, 5.0]), torch.eye(3), torch.ones(1, 1))
    linear = nn.Linear(3, 4)
    layer = Quantized(copy.deepcopy(linear), 4, SEEN)
    compensate(layer, moments)
    weight = layer.inner.weight.detach()
    whole = layer.integer().weight * layer.weight_scale(weight)[:, None]
    assert layer.inner.bias is not None
    assert torch.allclose(whole @ moments.mean + layer.inner.bias, linear(moments.mean), atol=1e-5)


def test_a_depthwise_convolution_is_left_as_it_is() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=4)
    layer = Quantized(copy.deepcopy(conv), 4, SEEN)
    compensate(layer, Moments(torch.zeros(4), torch.eye(4), torch.ones(3, 3)))
    assert torch.equal(layer.inner.weight, conv.weight)
