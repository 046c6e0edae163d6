"""Statistics of inputs against their definitions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from planish.spaces.moments import ROWS, NormMemory, correct_batch_norms, fit
from planish.spaces.reads import places
from planish.spaces.trace import TracedModel, trace

if TYPE_CHECKING:
    from tests.spaces.conftest import Net


def test_moments_of_a_convolution_are_those_of_its_input_pixels() -> None:
    inputs = torch.randn(70, 5, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100
    traced = trace(nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 2)), inputs)
    found = fit(traced, {"0": 1}, inputs).moments["0"]
    rows = inputs.transpose(0, 1).flatten(1).double()
    assert torch.allclose(found.mean.double(), rows.mean(1), atol=1e-4)
    assert torch.allclose(found.covariance.double(), torch.cov(rows, correction=0), atol=1e-3)
    assert found.taps.shape == (3, 3)
    assert abs(float(found.taps[0, 1])) < 0.1  # independent pixels


def test_taps_are_the_correlation_of_a_pixel_with_its_neighbours() -> None:
    rows = torch.randn(64, 3, 8, 1, generator=torch.Generator().manual_seed(0)).expand(64, 3, 8, 8)
    traced = trace(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)), rows)
    taps = fit(traced, {"0": 1}, rows).moments["0"].taps
    assert torch.allclose(taps[1], torch.ones(3), atol=1e-4)  # a row repeats one value
    assert float(taps[0].abs().max()) < 0.15


def test_moments_behind_a_flatten_are_those_of_channels(nets: dict[str, Net]) -> None:
    net = nets["mobile"]
    seen = []
    handle = net.model.get_submodule("fc1").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net.model(net.calibration)
    handle.remove()
    rows = seen[0].reshape(48, 64, 4).transpose(0, 1).flatten(1)
    found = fit(net.traced, {"fc1": 4}, net.calibration).moments["fc1"]
    assert torch.allclose(found.mean, rows.mean(1), atol=1e-5)
    assert torch.allclose(found.covariance, torch.cov(rows, correction=0), atol=1e-5)


def test_other_inputs_are_looked_at_again_and_the_same_ones_are_not(nets: dict[str, Net]) -> None:
    net = nets["mlp"]
    first = fit(net.traced, {"3": 1}, net.calibration)
    assert fit(net.traced, {"3": 1}, net.calibration.clone()) is first
    assert fit(net.traced, {"3": 1}, net.calibration + 1) is not first


def remember(traced: TracedModel, inputs: Tensor) -> dict[str, NormMemory]:
    return {
        name: NormMemory(
            traced.module.get_buffer(f"{name}.running_mean"), traced.module.get_buffer(f"{name}.running_var"), *seen
        )
        for name, seen in fit(traced, {}, inputs).norms.items()
    }


def test_a_model_that_did_not_change_keeps_its_batch_norms(net: Net) -> None:
    module = copy.deepcopy(net.traced.module)
    correct_batch_norms(module, net.calibration, remember(net.traced, net.calibration))
    before, after = net.traced.module.state_dict(), module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before)


def test_scaled_and_shifted_layers_are_corrected_exactly_one_behind_the_other() -> None:
    inputs = torch.randn(130, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 10  # three batches
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    value = inputs
    for layer in model.eval():
        if isinstance(layer, nn.BatchNorm2d):  # its statistics are those of the inputs themselves
            layer.running_var, layer.running_mean = torch.var_mean(value.detach(), (0, 2, 3), correction=0)
        value = layer(value)
    traced = trace(model, inputs)
    module = copy.deepcopy(traced.module)
    with torch.no_grad():
        for name in ("0", "3"):
            module.get_parameter(f"{name}.weight").mul_(2)
            module.get_parameter(f"{name}.bias").mul_(2).add_(5)
    variance = traced.module.get_buffer("1.running_var")
    for _ in range(2):  # correcting twice is correcting once
        correct_batch_norms(module, inputs, remember(traced, inputs))
        assert torch.allclose(module.get_buffer("1.running_var"), 4 * variance, rtol=1e-3)
        assert torch.allclose(module(inputs), traced.module(inputs), atol=0.01)  # three batches differ
    assert module.get_submodule("1").momentum == 0.1
    assert not any(part.training for part in module.modules())


def test_a_norm_is_corrected_to_what_reads_like_the_original() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    traced = trace(model, inputs)
    module = copy.deepcopy(traced.module)
    with torch.no_grad():
        module.get_parameter("0.bias").add_(7)
    correct_batch_norms(module, inputs, remember(traced, inputs))
    assert torch.allclose(module(inputs), traced.module(inputs), atol=1e-4)


@pytest.mark.parametrize("width", [32, 21, 49])
def test_a_few_positions_of_large_inputs_are_like_all_of_them(width: int) -> None:
    """What lies in an image's first columns is another thing than what lies inside."""
    noise = torch.randn(96, 3, 32, width, generator=torch.Generator().manual_seed(0))
    inputs = noise * torch.linspace(0.1, 2.0, width) + torch.linspace(-1, 1, width)
    rows = inputs.transpose(0, 1).flatten(1).double()
    assert rows.shape[1] > ROWS
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), inputs)
    found = fit(traced, {"0": 1}, inputs).moments["0"]
    assert torch.allclose(found.mean.double(), rows.mean(1), atol=0.05)
    assert torch.allclose(found.covariance.double(), torch.cov(rows, correction=0), atol=0.1)


def test_positions_are_the_same_ones_every_time_and_all_where_they_are_few() -> None:
    first, again = places(65536, 1000), places(65536, 1000)
    assert isinstance(first, Tensor)
    assert isinstance(again, Tensor)
    assert torch.equal(first, again)
    assert len(set((first % 32).tolist())) == 32
    assert torch.arange(7)[places(7, 10)].tolist() == list(range(7))


@pytest.mark.parametrize(("variance", "scale"), [(1.0, 3.0), (1e-7, 30.0), (1e-7, 0.3)])
def test_a_channel_that_hardly_varies_is_no_louder_than_it_was(variance: float, scale: float) -> None:
    """What a norm divides by is nearly all its constant there, and has to change as well."""
    norm = nn.BatchNorm2d(1).eval()
    values = variance**0.5 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, seen = values.mean().reshape(1), values.var(unbiased=False).reshape(1)
    norm.running_mean, norm.running_var = mean.clone(), seen.clone()
    wanted = norm(values)
    memory = NormMemory(mean, seen, mean[None], seen[None])
    norm.running_mean, norm.running_var = memory.correct(norm, 0, scale * values)
    if scale > 1:
        assert torch.allclose(norm(scale * values), wanted, rtol=0.01, atol=1e-6)
    else:  # what it divides by cannot be below its constant
        assert float(norm(scale * values).detach().std()) <= 1.01 * float(wanted.detach().std())


def test_a_norm_makes_up_for_lost_variance_to_a_bound() -> None:
    norm = nn.BatchNorm2d(1).eval()
    values = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    memory = NormMemory(torch.zeros(1), torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1))
    for scale, least, expected in ((0.9, 0.5, 1.0), (0.1, 0.5, 0.1 / 0.5**0.5), (0.1, 0.0, 1.0)):
        norm.running_mean, norm.running_var = memory.correct(norm, 0, scale * values, least)
        assert float(norm(scale * values).detach().std()) == pytest.approx(expected, rel=0.05)
