"""Blocks that replace a convolution: exact where the convolution already has their form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.spaces.blocks import Grouped, Separable, block_options, build_block, group_count
from planish.spaces.moments import Moments

OPTIONS = ["grouped", "separable", "pointwise", "identity"]


def moments_of(x: Tensor, taps: Tensor | None = None) -> Moments:
    rows = x.transpose(0, 1).flatten(1)
    return Moments(rows.mean(1), torch.cov(rows, correction=0), torch.ones(1, 1) if taps is None else taps)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 64, 3, 2, 1, bias=False),
        nn.Conv2d(64, 32, (3, 5), (1, 2), (1, 2)),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 5, padding=1),
    ],
)
def test_every_block_keeps_the_shape_and_has_fewer_weights(conv: nn.Conv2d) -> None:
    x = torch.randn(2, conv.in_channels, 11, 9)
    for option in block_options(conv, 16):
        block, note = build_block(conv, option, 16, True, None)
        assert note == ""
        assert block(x).shape == conv(x).shape
        assert sum(p.numel() for p in block.parameters()) < sum(p.numel() for p in conv.parameters())


def test_which_blocks_a_convolution_may_become() -> None:
    assert block_options(nn.Conv2d(32, 32, 3, padding=1), 16) == OPTIONS
    assert block_options(nn.Conv2d(32, 32, 3, 2, 1), 16) == OPTIONS[:3]
    assert block_options(nn.Conv2d(32, 48, 3, padding=1), 16) == OPTIONS[1:3]
    assert block_options(nn.Conv2d(16, 16, 3), 16) == ["separable"]


def test_groups_hold_whole_lanes() -> None:
    assert [group_count(i, o, 16) for i, o in ((64, 64), (48, 96), (64, 32), (16, 32), (40, 40))] == [4, 3, 2, 1, 1]


def test_a_convolution_of_rank_one_kernels_becomes_separable_exactly() -> None:
    conv = nn.Conv2d(6, 10, 3, 2, 1)
    conv.weight.data = torch.randn(10, 6, 1, 1) * torch.randn(1, 6, 3, 3)
    block, _ = build_block(conv, "separable", 16, True, None)
    assert isinstance(block, Separable)
    x = torch.randn(2, 6, 9, 9)
    assert torch.allclose(block(x), conv(x), atol=1e-5)


def smooth(channels: int, generator: torch.Generator) -> Tensor:
    """Images whose channels and neighbouring pixels are alike."""
    x = nn.functional.avg_pool2d(torch.randn(48, channels, 12, 12, generator=generator), 3, 1, 1)
    mix = torch.eye(channels) + 0.5 * torch.randn(channels, channels, generator=generator)
    return torch.einsum("nchw,dc->ndhw", x, mix)


@pytest.mark.parametrize("seed", range(4))
def test_separable_with_moments_fits_the_outputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    conv.weight.data = torch.randn(12, 8, 3, 3, generator=generator)
    x = smooth(8, generator)
    taps = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]) / 9  # of a mean over 3 x 3 pixels
    blind, _ = build_block(conv, "separable", 16, True, None)
    fitted, _ = build_block(conv, "separable", 16, True, moments_of(x, taps))
    inner = (..., slice(1, -1), slice(1, -1))
    with torch.no_grad():
        errors = [float((block(x)[inner] - conv(x)[inner]).square().mean()) for block in (fitted, blind)]
    assert errors[0] < 0.8 * errors[1]


def test_separable_with_moments_is_exact_where_it_can_be() -> None:
    conv = nn.Conv2d(6, 10, 3, 2, 1)
    conv.weight.data = torch.randn(10, 6, 1, 1) * torch.randn(1, 6, 3, 3)
    x = torch.randn(2, 6, 9, 9)
    block, _ = build_block(conv, "separable", 16, True, moments_of(x, torch.ones(3, 3) * 0.5))
    assert torch.allclose(block(x), conv(x), atol=1e-4)


def test_a_kernel_with_only_a_centre_becomes_pointwise_exactly() -> None:
    conv = nn.Conv2d(6, 10, 3, 2, 1)
    with torch.no_grad():
        centre = conv.weight[:, :, 1, 1].clone()
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = centre
    block, _ = build_block(conv, "pointwise", 16, True, None)
    x = torch.randn(2, 6, 9, 9)
    assert torch.allclose(block(x), conv(x), atol=1e-6)


def test_pointwise_on_constant_pixels_sums_the_taps() -> None:
    conv = nn.Conv2d(6, 10, 3, padding=1)
    x = torch.randn(4, 6, 1, 1).expand(4, 6, 7, 7)
    block, _ = build_block(conv, "pointwise", 16, True, moments_of(x, torch.ones(3, 3)))
    assert torch.allclose(block(x)[..., 3, 3], conv(x)[..., 3, 3], atol=1e-5)


def test_pointwise_on_independent_pixels_keeps_the_centre_alone() -> None:
    conv = nn.Conv2d(6, 10, 3, padding=1)
    taps = torch.zeros(3, 3)
    taps[1, 1] = 1
    block, _ = build_block(conv, "pointwise", 16, True, moments_of(torch.randn(4, 6, 7, 7), taps))
    assert torch.equal(block.get_parameter("weight")[:, :, 0, 0], conv.weight[:, :, 1, 1])


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_separate_groups_becomes_grouped_exactly(bias: bool) -> None:
    conv = nn.Conv2d(8, 12, 3, padding=1, bias=bias)
    group_of_input, group_of_output = torch.arange(8) // 2, torch.arange(12) % 4  # the shuffle deals outputs out
    with torch.no_grad():
        conv.weight[group_of_output[:, None] != group_of_input] = 0
    block, _ = build_block(conv, "grouped", 1, True, None)
    assert isinstance(block, Grouped)
    x = torch.randn(2, 8, 7, 7)
    assert torch.allclose(block(x), conv(x), atol=1e-5)


def test_grouped_with_moments_predicts_the_other_groups_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    half = torch.randn(32, 4, 8, 8, generator=generator)
    x = torch.cat([half, half @ torch.eye(8) * 0.5 + 1], 1)  # every channel of one half is in the other
    blind, _ = build_block(conv, "grouped", 4, True, None)
    fitted, _ = build_block(conv, "grouped", 4, True, moments_of(x))
    inner = (..., slice(1, -1), slice(1, -1))  # at the border the constant 1 meets zeros
    errors = [(block(x)[inner] - conv(x)[inner]).norm() / conv(x)[inner].norm() for block in (fitted, blind)]
    assert errors[0] < 0.02
    assert errors[0] < 0.1 * errors[1]


def test_identity_passes_its_input_on() -> None:
    block, _ = build_block(nn.Conv2d(8, 8, 3, padding=1), "identity", 16, True, None)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x)


def test_what_pruning_made_impossible_is_done_otherwise_and_said() -> None:
    block, note = build_block(nn.Conv2d(16, 16, 3, padding=1), "identity", 16, False, None)
    assert isinstance(block, nn.Conv2d)
    assert "became pointwise" in note
    block, note = build_block(nn.Conv2d(16, 32, 3, padding=1), "grouped", 16, True, None)
    assert isinstance(block, Grouped)
    assert "2 groups" in note
    conv = nn.Conv2d(15, 32, 3, padding=1)
    block, note = build_block(conv, "grouped", 16, True, None)
    assert block is conv
    assert "stayed dense" in note


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="'fire' is not one of"):
        build_block(nn.Conv2d(4, 4, 3), "fire", 16, True, None)
