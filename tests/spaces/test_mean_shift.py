"""Replacements that were fitted to covariances keep the mean of what a layer with a bias returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.spaces.lowrank import Extent
from planish.spaces.moments import Moments
from planish.spaces.stages import factorise_site, replace_site, share_site

GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(8, 8, generator=GENERATOR)
MOMENTS = Moments(torch.rand(8, generator=GENERATOR) * 3, MIX @ MIX.T, torch.full((3, 3), 0.5).fill_diagonal_(1.0))
EXTENT = Extent((12, 12), (12, 12))


def inside(layer: nn.Module, constant: Tensor) -> Tensor:
    """What a layer makes of an image that is everywhere the same, away from the image's borders."""
    with torch.no_grad():
        result: Tensor = layer(constant[None, :, None, None].expand(1, -1, 12, 12))[0, :, 6, 6]
    return result


@pytest.mark.parametrize("change", ["spatial:4", "tucker:4x4", "separable", "pointwise", "grouped", "shared"])
def test_a_convolution_gives_what_it_gave_for_the_mean_input(change: str) -> None:
    torch.manual_seed(0)
    holder, old = nn.Module(), nn.Conv2d(8, 8, 3, padding=1)
    holder.layer = old
    wanted, bias = inside(old, MOMENTS.mean), old.get_parameter("bias").detach().clone()
    if change == "shared":
        share_site(holder, "layer", 4, moments=MOMENTS)
    elif ":" in change:
        factorise_site(holder, "layer", change, EXTENT, MOMENTS)
    else:
        replace_site(holder, "layer", change, 4, (), MOMENTS)
    assert holder.layer is not old
    assert isinstance(holder.layer, nn.Module)
    assert torch.allclose(inside(holder.layer, MOMENTS.mean), wanted, atol=1e-4)
    assert torch.equal(old.get_parameter("bias"), bias)


@pytest.mark.parametrize("pixels", [1, 4])
def test_a_linear_layer_does_too_also_behind_a_flatten(pixels: int) -> None:
    torch.manual_seed(0)
    holder = nn.Module()
    holder.layer = nn.Linear(8 * pixels, 16)
    moments = Moments(MOMENTS.mean, MOMENTS.covariance, torch.ones(1, 1))
    constant = moments.mean.repeat_interleave(pixels)
    wanted = holder.layer(constant).detach()
    factorise_site(holder, "layer", "svd:3", Extent(), moments)
    assert torch.allclose(holder.layer(constant), wanted, atol=1e-4)


def test_without_a_bias_or_moments_nothing_is_added() -> None:
    for bias, moments in ((False, MOMENTS), (True, None)):
        torch.manual_seed(0)
        holder, old = nn.Module(), nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        holder.layer = old
        share_site(holder, "layer", 4, moments=moments)
        new = holder.get_submodule("layer")
        assert new is not old
        assert isinstance(new, nn.Conv2d)
        assert (new.bias is None) if old.bias is None else torch.equal(new.get_parameter("bias"), old.bias)
