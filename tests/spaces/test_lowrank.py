"""Factorised layers against the layers that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.spaces.lowrank import Extent, Rank, dense_macs, factor_macs, factorise, fit_rank, rank_options
from planish.spaces.moments import Moments, fit
from planish.spaces.size import count_macs
from planish.spaces.trace import trace


def random_moments(channels: int) -> Moments:
    mix = torch.randn(channels, channels, generator=torch.Generator().manual_seed(1))
    return Moments(torch.zeros(channels), mix @ mix.T / channels, torch.ones(1, 1))


CONVOLUTIONS = [
    nn.Conv2d(6, 8, 3, padding=1),
    nn.Conv2d(8, 6, (3, 5), (2, 1), (1, 2), bias=False),
    nn.Conv2d(5, 5, 3, padding=2, dilation=2),
    nn.Conv2d(4, 7, 5, 3),
]


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
@pytest.mark.parametrize("method", ["spatial", "tucker"])
def test_full_rank_computes_what_the_convolution_computes(conv: nn.Conv2d, method: str, whitened: bool) -> None:
    outputs, inputs, height, width = conv.weight.shape
    rank = min(outputs * width, inputs * height)
    full = Rank.parse(f"spatial:{rank}" if method == "spatial" else f"tucker:{inputs}x{outputs}")
    x = torch.randn(2, inputs, 11, 13)
    factors = factorise(conv, full, random_moments(inputs) if whitened else None)
    assert torch.allclose(factors(x), conv(x), atol=1e-5)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(12, 8), nn.Linear(6, 9, bias=False), nn.Conv2d(6, 9, 1, 2)])
def test_full_rank_svd_computes_what_the_layer_computes(layer: nn.Linear | nn.Conv2d, whitened: bool) -> None:
    inputs = layer.weight.shape[1]
    x = torch.randn(3, inputs) if isinstance(layer, nn.Linear) else torch.randn(3, inputs, 7, 7)
    factors = factorise(layer, Rank("svd", (min(layer.weight.shape[:2]),)), random_moments(6) if whitened else None)
    assert torch.allclose(factors(x), layer(x), atol=1e-5)


def product(factors: nn.Module) -> Tensor:
    first, second = (layer.get_parameter("weight").flatten(1) for layer in factors.children())
    return second @ first


def test_truncated_svd_has_the_error_of_the_singular_values_that_it_drops() -> None:
    layer = nn.Linear(20, 12)
    singular = torch.linalg.svdvals(layer.weight.detach())
    for rank in (1, 5, 11):
        error = (product(factorise(layer, Rank("svd", (rank,)))) - layer.weight).norm()
        assert torch.allclose(error, singular[rank:].norm(), rtol=1e-4)


def test_spatial_factors_have_the_error_of_the_singular_values_that_they_drop() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    vertical, horizontal = (
        layer.get_parameter("weight") for layer in factorise(conv, Rank("spatial", (5,))).children()
    )
    got = torch.einsum("orx,riy->oiyx", horizontal[:, :, 0], vertical[..., 0])
    matrix = conv.weight.detach().permute(0, 3, 1, 2).reshape(18, 12)
    assert torch.allclose((got - conv.weight).norm(), torch.linalg.svdvals(matrix)[5:].norm(), rtol=1e-4)


def test_tucker_is_better_than_truncating_both_sides_once() -> None:
    conv = nn.Conv2d(8, 8, 3, bias=False)
    weight = conv.weight.detach()
    first, core, last = (layer.get_parameter("weight") for layer in factorise(conv, Rank("tucker", (4, 4))).children())
    got = torch.einsum("oq,qpyx,pi->oiyx", last[..., 0, 0], core, first[..., 0, 0])
    tails = [torch.linalg.svdvals(side.flatten(1))[4:].square().sum() for side in (weight, weight.transpose(0, 1))]
    error = (got - weight).square().sum()
    left, right = (
        torch.linalg.svd(side.flatten(1), full_matrices=False)[0][:, :4] for side in (weight, weight.transpose(0, 1))
    )
    once = torch.einsum("oiyx,oa,pa,ib,jb->pjyx", weight, left, left, right, right)
    assert error < (once - weight).square().sum()  # the iteration improves on truncating once
    assert max(tails) * 0.999 <= error <= sum(tails)  # De Lathauwer et al. 2000, property 10


@pytest.mark.parametrize("option", ["svd:4", "spatial:4", "tucker:4x4"])
def test_moments_make_the_outputs_closer_than_the_weights_alone(option: str) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = 1 if option.startswith("svd") else 3
    conv = nn.Conv2d(12, 12, kernel, bias=False)
    mix = torch.randn(12, 12, generator=generator) * torch.logspace(0, -2, 12)
    x = torch.einsum("nchw,cd->ndhw", torch.randn(16, 12, 8, 8, generator=generator), mix)
    rows = x.transpose(0, 1).flatten(1)
    moments = Moments(rows.mean(1), torch.cov(rows, correction=0), torch.ones(1, 1))
    rank = Rank.parse(option)
    errors = [(factorise(conv, rank, m)(x) - conv(x)).norm() for m in (moments, None)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), (64, 10, 12)),
        (nn.Conv2d(32, 96, 3, 2, 1), (32, 11, 9)),
        (nn.Conv2d(64, 48, 1, 2), (64, 9, 9)),
        (nn.Linear(128, 96), (128,)),
    ],
)
def test_every_option_has_aligned_ranks_and_fewer_macs_and_they_are_counted_exactly(
    layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...]
) -> None:
    x = torch.randn(1, *shape)
    y = layer(x)
    extent = Extent((shape[1], shape[2]), (y.shape[2], y.shape[3])) if len(shape) == 3 else Extent()
    options = rank_options(layer, extent, 16)
    assert options
    assert dense_macs(layer, extent) == count_macs(layer, x)
    for option in options:
        rank = Rank.parse(option)
        assert str(rank) == option
        assert all(r % 16 == 0 for r in rank.ranks)
        assert fit_rank(rank, layer, extent) == rank
        factors = factorise(layer, rank)
        assert factors(x).shape == y.shape
        assert factor_macs(layer, rank, extent) == count_macs(factors, x) < dense_macs(layer, extent)


def test_a_small_layer_has_no_options() -> None:
    assert rank_options(nn.Linear(64, 10), Extent(), 16) == []


def test_ranks_are_capped_to_a_narrower_layer_or_dropped() -> None:
    extent = Extent((8, 8), (8, 8))
    assert fit_rank(Rank("tucker", (48, 16)), nn.Conv2d(32, 64, 3, padding=1), extent) == Rank("tucker", (32, 16))
    assert fit_rank(Rank("tucker", (32, 16)), nn.Conv2d(64, 64, 1), extent) == Rank("svd", (16,))
    assert fit_rank(Rank("spatial", (48,)), nn.Conv2d(16, 16, 3, padding=1), extent) is None
    assert fit_rank(Rank("svd", (32,)), nn.Linear(16, 64), Extent()) is None


@pytest.mark.parametrize("option", ["svd", "svd:", "svd:0", "svd:4x4", "tucker:4", "cp:4", "tucker:4x-1", ""])
def test_an_unknown_option_is_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match="is not svd:R"):
        Rank.parse(option)


@pytest.mark.parametrize("option", ["spatial:8", "tucker:8x8"])
def test_pixels_that_are_alike_under_a_kernel_are_reckoned_with(option: str) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 16, 20, 20, generator=generator)
    inputs = nn.functional.avg_pool2d(noise, 5, stride=1)
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    moments = fit(trace(nn.Sequential(conv), inputs[:32]), {"0": 1}, inputs[:32]).moments["0"]
    assert float(moments.taps[1, 0]) > 0.5
    held_out = inputs[32:]

    def error(known: Moments) -> float:
        with torch.no_grad():
            wanted = conv(held_out)
            return float((factorise(conv, Rank.parse(option), known)(held_out) - wanted).square().sum())

    channels_alone = Moments(moments.mean, moments.covariance, torch.ones(1, 1))
    assert error(moments) < 0.9 * error(channels_alone)


def test_spatial_factors_share_their_norms_whatever_the_input_is_like() -> None:
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    taps = torch.full((3, 3), 0.5).fill_diagonal_(1.0)
    conv, moments = nn.Conv2d(8, 8, 3, padding=1), Moments(torch.zeros(8), mix @ mix.T, taps)
    factors = factorise(conv, Rank.parse("spatial:6"), moments)
    first, second = (layer.get_parameter("weight").detach() for layer in factors.children())
    assert torch.allclose(first.flatten(1).norm(dim=1), second.transpose(0, 1).flatten(1).norm(dim=1), rtol=1e-4)
