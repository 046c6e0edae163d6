"""Block types: cheaper layers in the place of a k x k convolution, and how they start from what it computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .moments import Moments
from .prune import absorb

_SWEEPS = 12  # of least squares over the two factors of a separable block
SMOOTHNESS = 0.7  # correlation of neighbouring pixels that is assumed where no input was measured


class Separable(nn.Sequential):
    """A depthwise k x k convolution and a 1x1 convolution (Howard et al. 2017)."""


class Grouped(nn.Module):
    """A grouped k x k convolution whose output channels are dealt out in turn: a shuffle (Zhang et al. 2018).

    Group t reads the t-th part of the input channels and writes the output channels t, t + g, t + 2g, ...
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv: nn.Module = conv
        self.groups = conv.groups

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        batch, channels, height, width = y.shape
        parts = y.reshape(batch, self.groups, channels // self.groups, height, width)
        return parts.transpose(1, 2).reshape(batch, channels, height, width)


def block_options(conv: nn.Conv2d, lanes: int) -> list[str]:
    """The block types that can stand in for the convolution, most expensive first."""
    options = ["grouped"] if group_count(conv.in_channels, conv.out_channels, lanes) > 1 else []
    options.append("separable")
    if _keeps_size(conv):
        options.append("pointwise")
        if conv.in_channels == conv.out_channels and conv.stride == (1, 1):
            options.append("identity")
    return options


def group_count(inputs: int, outputs: int, lanes: int) -> int:
    """The most groups, at most 4, that divide both widths and leave whole lanes in each group; 1 if there is none."""
    for groups in (4, 3, 2):
        if inputs % (groups * lanes) == 0 and outputs % (groups * lanes) == 0:
            return groups
    return 1


def build_block(
    conv: nn.Conv2d, option: str, lanes: int, same_channels: bool, moments: Moments | None
) -> tuple[nn.Module, str]:
    """The block that replaces a convolution, which may have lost channels since `block_options` was asked.

    Args:
        same_channels: Whether what is left of the input and of the output channels are the same channels.
        moments: Of the convolution's input; the closed forms then fit its outputs rather than its weights.

    Returns:
        The block and a note, empty unless the option had to be read differently: `grouped` without a division into
        whole lanes takes two groups or, for odd widths, stays dense; `identity` between channels that are no longer
        the same becomes `pointwise`.
    """
    if option == "separable":
        return _separable(conv, moments), ""
    if option == "pointwise":
        return _pointwise(conv, moments), ""
    if option == "identity":
        if same_channels and conv.in_channels == conv.out_channels:
            return Same(), ""
        return _pointwise(conv, moments), "identity became pointwise: pruning left other channels on its two sides"
    if option != "grouped":
        raise ValueError(f"block {option!r} is not one of separable, grouped, pointwise, identity")
    groups = group_count(conv.in_channels, conv.out_channels, lanes)
    if groups > 1:
        return _grouped(conv, groups, moments), ""
    widths = f"{conv.in_channels} -> {conv.out_channels} channels"
    if conv.in_channels % 2 == 0 and conv.out_channels % 2 == 0:
        return _grouped(conv, 2, moments), f"grouped has 2 groups of less than {lanes} lanes: {widths} after pruning"
    return conv, f"grouped stayed dense: {widths} after pruning do not divide"


class Same(nn.Identity):
    """The input, as a value of its own: what follows may write its result in the place of this one's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _separable(conv: nn.Conv2d, moments: Moments | None) -> Separable:
    """Per input channel the best rank-1 W[:, i] ~ p_i d_i^T (Eckart and Young 1936), scale shared equally.

    With moments the outputs are fitted, not the weights: least squares of one factor after the other from there on.
    """
    weight = conv.weight.detach()
    outputs, inputs = weight.shape[:2]
    taps = weight.double().flatten(2)
    u, s, v = torch.linalg.svd(taps.transpose(0, 1), full_matrices=False)
    across, kernels = u[:, :, 0].T * s[:, 0], v[:, 0]
    if moments is not None and moments.taps.shape == conv.kernel_size:
        across, kernels = _fitted_factors(taps, across, kernels, moments)
    scale = (across.norm(dim=0) / kernels.norm(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    depthwise = _like(conv, (kernels * scale[:, None]).reshape(inputs, 1, *weight.shape[2:]), groups=inputs, bias=None)
    pointwise = _like(conv, (across / scale).reshape(outputs, inputs, 1, 1), spatial=False, bias=conv.bias)
    return Separable(OrderedDict([("depthwise", depthwise), ("pointwise", pointwise)]))


def _fitted_factors(taps: Tensor, across: Tensor, kernels: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Factors p (o, i) and d (i, t) whose outputs are nearest to those of the taps W (o, i, t).

    With the covariance C of channels and T between taps, the error is a quadratic form in either factor. For given d
    it is least at p = R K^-1, K = C * (d T d^T) and R[o, i] = sum_j C_ij W_oj T d_i; for given p where
    (p^T p * C) d = sum_oj p_oi C_ij W_oj, in which T cancels. Where the covariance of all that a kernel reads is known
    (`Moments.patches`), it goes on from there with that one.
    """
    channels, between = moments.ridge().double(), moments.between_taps()
    mixed = torch.einsum("ojt,ij->oit", taps, channels)
    for _ in range(_SWEEPS):
        gram = channels * (kernels @ between @ kernels.T)
        wanted = torch.einsum("oit,ts,is->oi", mixed, between, kernels)
        across = _solved(gram, wanted.T).T
        kernels = _solved(channels * (across.T @ across), torch.einsum("oi,oit->it", across, mixed))
        size = kernels.norm(dim=1, keepdim=True).clamp_min(1e-30)
        kernels, across = kernels / size, across * size.T
    reads = moments.of_reads()
    if reads is None:
        return across, kernels
    width, places = kernels.shape
    whole = reads[1].reshape(width, places, width, places)
    wanted = (taps.flatten(1) @ reads[1]).reshape(-1, width, places)
    for _ in range(_SWEEPS):
        gram = torch.einsum("it,itjs,js->ij", kernels, whole, kernels)
        across = _solved(gram, torch.einsum("oit,it->io", wanted, kernels)).T
        matrix = (whole * (across.T @ across)[:, None, :, None]).reshape(width * places, width * places)
        kernels = _solved(matrix, torch.einsum("oi,oit->it", across, wanted).reshape(-1, 1)).reshape(width, places)
        size = kernels.norm(dim=1, keepdim=True).clamp_min(1e-30)
        kernels, across = kernels / size, across * size.T
    return across, kernels


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of a symmetric system, made safely solvable where a channel says nothing."""
    level = 1e-9 * matrix.diagonal().mean().clamp_min(1e-30)
    found: Tensor = torch.linalg.solve(matrix + level * torch.eye(len(matrix), dtype=matrix.dtype), right)
    return found


def _pointwise(conv: nn.Conv2d, moments: Moments | None) -> nn.Conv2d:
    """W'[o, i] = sum_t rho_t W[o, i, t], rho_t the correlation of the pixel under tap t with the one in the centre.

    That is the least-squares fit if the covariance of two channels at a distance is rho times that at one pixel.
    """
    reads = None if moments is None else moments.of_reads()
    if reads is not None:
        # Least squares on what is read in the centre.
        covariance, size = reads[1], conv.kernel_size[0] * conv.kernel_size[1]
        middle = conv.kernel_size[0] // 2 * conv.kernel_size[1] + conv.kernel_size[1] // 2
        centre = torch.arange(conv.in_channels) * size + middle
        wanted = conv.weight.detach().double().flatten(1) @ covariance[:, centre]
        fitted = torch.linalg.solve(covariance[centre][:, centre], wanted, left=False)[:, :, None, None]
        return _like(conv, fitted.to(conv.weight.dtype), spatial=False, stride=conv.stride, bias=conv.bias)
    if moments is not None and moments.taps.shape == conv.kernel_size:
        taps = moments.taps
    else:
        rows, columns = (
            SMOOTHNESS ** (torch.arange(size) - size // 2).abs().mul(step)
            for size, step in zip(conv.kernel_size, conv.dilation, strict=True)
        )
        taps = torch.outer(rows, columns)
    weight = (conv.weight.detach() * taps).sum((2, 3), keepdim=True)
    return _like(conv, weight, spatial=False, stride=conv.stride, bias=conv.bias)


def _grouped(conv: nn.Conv2d, groups: int, moments: Moments | None) -> Grouped:
    """Keeps each group's own block of the weight; with moments it also predicts what the other inputs brought."""
    weight = conv.weight.detach()
    size = conv.in_channels // groups
    everything = torch.arange(conv.in_channels)
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()
    parts = []
    for group in range(groups):
        rows, own = weight[group::groups], everything[group * size : (group + 1) * size]
        if moments is None:
            parts.append(rows[:, own])
        else:
            others = everything[(everything < own[0]) | (everything > own[-1])]
            fitted, missing = absorb(rows, own, others, moments)
            parts.append(fitted)
            bias[group::groups] += missing
    # The shuffle deals the bias out as well, so the convolution holds it in the order of its own outputs.
    inner = torch.cat([bias[group::groups] for group in range(groups)])
    return Grouped(_like(conv, torch.cat(parts), groups=groups, bias=None if conv.bias is None else inner))


def _like(
    conv: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    groups: int = 1,
    spatial: bool = True,
    stride: Sequence[int] | None = None,
) -> nn.Conv2d:
    """A convolution with this weight (o, i / groups, kh, kw); a spatial one steps and pads as `conv` does."""
    outputs, inputs, height, width = weight.shape
    step = tuple(conv.stride if spatial else stride or (1, 1))
    padding = conv.padding if spatial else (0, 0)
    dilation = conv.dilation if spatial else (1, 1)
    assert not isinstance(padding, str)  # `propose` leaves out what is padded by name
    result = nn.Conv2d(
        inputs * groups,
        outputs,
        (height, width),
        (step[0], step[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        groups,
        bias is not None,
        device=weight.device,
    )
    with torch.no_grad():
        result.weight.copy_(weight)
        if result.bias is not None and bias is not None:
            result.bias.copy_(bias)
    return result


def _keeps_size(conv: nn.Conv2d) -> bool:
    """Whether a 1x1 kernel without padding reads the centres that the kernel reads: 2 p = d (k - 1)."""
    return not isinstance(conv.padding, str) and all(
        2 * p == d * (k - 1) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    )
