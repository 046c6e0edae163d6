"""Low-rank layers: a linear or convolutional layer as two or three thinner ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .moments import Moments

Method = Literal["svd", "spatial", "tucker"]


class LowRank(nn.Sequential):
    """Factors of a layer, applied in order."""


@dataclass(frozen=True)
class Rank:
    """A factorisation: `svd:R` (linear, 1x1), `spatial:R` (k x 1 then 1 x k) or `tucker:RIxRO` (1x1, k x k, 1x1)."""

    method: Method
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.method}:{'x'.join(str(rank) for rank in self.ranks)}"

    @staticmethod
    def parse(option: str) -> Rank:
        """Reads what `str` writes."""
        method, _, ranks = option.partition(":")
        for known in ("svd", "spatial", "tucker"):
            if method == known and all(part.isdecimal() for part in ranks.split("x")):
                found = tuple(int(part) for part in ranks.split("x"))
                if len(found) == (2 if known == "tucker" else 1) and min(found) > 0:
                    return Rank(known, found)
        raise ValueError(f"rank option {option!r} is not svd:R, spatial:R or tucker:RIxRO with positive integers")


@dataclass(frozen=True)
class Extent:
    """The pixels (height, width) that a layer reads and writes for one input; (1, 1) for a linear layer."""

    reads: tuple[int, int] = (1, 1)
    writes: tuple[int, int] = (1, 1)


def rank_options(layer: nn.Conv2d | nn.Linear, extent: Extent, lanes: int) -> list[str]:
    """Factorisations with about 3/4, 1/2 and 1/4 of the cost, ranks in multiples of `lanes`, cheapest last."""
    shape = _shape(layer)
    dense = dense_macs(layer, extent)
    found: list[Rank] = []
    for method in _methods(layer):
        for share in (0.75, 0.5, 0.25):
            if method == "tucker":
                ranks = tuple(min(_aligned(share * width, lanes), width) for width in (shape[1], shape[0]))
            else:
                ranks = (_aligned(share * dense / factor_macs(layer, Rank(method, (1,)), extent), lanes),)
            rank = Rank(method, ranks)
            if rank not in found and _fits(rank, shape) and factor_macs(layer, rank, extent) < dense:
                found.append(rank)
    return [str(rank) for rank in found]


def fit_rank(rank: Rank, layer: nn.Conv2d | nn.Linear, extent: Extent) -> Rank | None:
    """The factorisation as it can be done to this layer, which may be narrower than the one it was proposed for.

    Ranks are capped to what the layer's shape allows; a layer with a 1x1 kernel or none takes any method as `svd` with
    the smallest rank. None if the factors would need no fewer MACs than the layer.
    """
    shape = _shape(layer)
    if rank.method not in _methods(layer):
        rank = Rank(_methods(layer)[0], (min(rank.ranks),))
    if rank.method == "tucker":
        rank = Rank("tucker", (min(rank.ranks[0], shape[1]), min(rank.ranks[1], shape[0])))
    else:
        rank = Rank(rank.method, (min(rank.ranks[0], _largest(rank.method, shape)),))
    return rank if factor_macs(layer, rank, extent) < dense_macs(layer, extent) else None


def dense_macs(layer: nn.Conv2d | nn.Linear, extent: Extent) -> int:
    """Multiply-accumulates of the layer for one input."""
    return layer.weight.numel() * extent.writes[0] * extent.writes[1]


def factor_macs(layer: nn.Conv2d | nn.Linear, rank: Rank, extent: Extent) -> int:
    """Multiply-accumulates of the factors for one input."""
    outputs, inputs, height, width = _shape(layer)
    written = extent.writes[0] * extent.writes[1]
    if rank.method == "tucker":
        first, last = rank.ranks
        read = extent.reads[0] * extent.reads[1]
        return first * inputs * read + (first * last * height * width + last * outputs) * written
    if rank.method == "spatial":
        between = extent.writes[0] * extent.reads[1]  # the vertical factor strides down, the horizontal one across
        return rank.ranks[0] * (inputs * height * between + outputs * width * written)
    return rank.ranks[0] * (inputs + outputs) * written


def factorise(layer: nn.Conv2d | nn.Linear, rank: Rank, moments: Moments | None = None) -> LowRank:
    """The layer as its factors; at full rank they compute what the layer computes.

    Without moments the error of the weights is the least for SVD (Eckart and Young 1936) and close to it for Tucker-2
    (higher-order orthogonal iteration, De Lathauwer et al. 2000). With the moments of the layer's input the error of
    the outputs is: W C^(1/2) is factorised instead of W, C the covariance of what the weights multiply, that of the
    input channels times those between a kernel's rows and columns. Where the covariance of all that a kernel reads is
    known (`Moments.patches`), the factors behind the first are then fitted to it by least squares.
    """
    weight = layer.weight.detach().double()
    root = None if moments is None else _root(moments.ridge().double())
    if root is not None:
        blocks = weight.reshape(weight.shape[0], len(root), -1)
        weight = torch.einsum("ocp,cd->odp", blocks, root).reshape(weight.shape)
    taps = None
    if moments is not None and isinstance(layer, nn.Conv2d) and moments.taps.shape == layer.kernel_size:
        rows, columns = moments.along_taps()
        taps = _root(rows), _root(columns)
        weight = torch.einsum("oiyx,yt,xs->oits", weight, *taps)
    if isinstance(layer, nn.Linear):
        first, second = _svd(weight, rank.ranks[0])
        return _linear(layer, _unroot(first, root), second)
    if rank.method == "tucker":
        return _tucker(layer, weight, rank.ranks, root, taps, moments)
    if rank.method == "spatial":
        return _spatial(layer, weight, rank.ranks[0], root, taps, moments)
    first, second = _svd(weight.flatten(1), rank.ranks[0])
    factors = (
        _convolution(layer, _unroot(first, root)[:, :, None, None], stride=layer.stride),
        _convolution(layer, second[:, :, None, None], last=True),
    )
    return LowRank(OrderedDict(zip(("first", "second"), factors, strict=True)))


_Taps = tuple[Tensor, Tensor]


def _spatial(
    layer: nn.Conv2d, weight: Tensor, rank: int, root: Tensor | None, taps: _Taps | None, moments: Moments | None
) -> LowRank:
    """W[o, i, y, x] ~ sum_r H[o, r, x] V[r, i, y], by SVD of the (i y, o x) matrix (Jaderberg et al. 2014)."""
    outputs, inputs, height, width = weight.shape
    matrix = weight.permute(0, 3, 1, 2).reshape(outputs * width, inputs * height)
    vertical, horizontal = _svd(matrix, rank)
    vertical = _unroot(vertical.reshape(rank, inputs, height), root)
    horizontal = horizontal.reshape(outputs, width, rank).permute(0, 2, 1)
    if taps is not None:
        vertical = torch.linalg.solve(taps[0], vertical, left=False)
        horizontal = torch.linalg.solve(taps[1], horizontal, left=False)
    # What the horizontal factor reads: of every rank and column of the kernel a sum over channels and rows.
    first = torch.einsum("riy,xz->rxiyz", vertical, torch.eye(width, dtype=vertical.dtype)).reshape(rank * width, -1)
    if (fitted := _fitted(layer, first, moments)) is not None:
        horizontal = fitted[0].reshape(outputs, rank, width)
    # Without the whitening the factors' norms are others than those that they share.
    scale = (vertical.flatten(1).norm(dim=1) / horizontal.norm(dim=(0, 2)).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    vertical, horizontal = vertical / scale[:, None, None], horizontal * scale[None, :, None]
    vertical, horizontal = vertical[..., None], horizontal[:, :, None, :]
    (down, across), (top, left), (dy, dx) = layer.stride, _padding(layer), layer.dilation
    factors = (
        _convolution(layer, vertical, stride=(down, 1), padding=(top, 0), dilation=(dy, 1)),
        _convolution(layer, horizontal, stride=(1, across), padding=(0, left), dilation=(1, dx), last=True),
    )
    return LowRank(OrderedDict(zip(("first", "second"), factors, strict=True)))


def _tucker(
    layer: nn.Conv2d,
    weight: Tensor,
    ranks: Sequence[int],
    root: Tensor | None,
    taps: _Taps | None,
    moments: Moments | None,
) -> LowRank:
    """W[o, i, y, x] ~ sum_pq B[o, q] G[q, p, y, x] A[p, i] (Tucker-2, Kim et al. 2016)."""
    inside, outside = ranks
    left = _leading(weight.flatten(1), outside)
    right = _leading(weight.transpose(0, 1).flatten(1), inside)
    for _ in range(3):
        left = _leading(torch.einsum("oiyx,ip->opyx", weight, right).flatten(1), outside)
        right = _leading(torch.einsum("oiyx,oq->iqyx", weight, left).flatten(1), inside)
    core = torch.einsum("oiyx,oq,ip->qpyx", weight, left, right)
    if taps is not None:
        core = torch.linalg.solve(taps[1], torch.linalg.solve(taps[0], core.mT, left=False).mT, left=False)
    narrow = _unroot(right.T, root)
    inner = torch.eye(core.shape[2] * core.shape[3], dtype=core.dtype)
    if (fitted := _fitted(layer, torch.kron(narrow, inner), moments)) is not None:
        # The best of that rank: reduced-rank regression (Izenman 1975).
        dense, covariance = fitted
        left = torch.linalg.svd(dense @ _root(covariance), full_matrices=False).U[:, :outside]
        core = (left.T @ dense).reshape(outside, inside, *core.shape[2:])
    factors = (
        _convolution(layer, narrow[:, :, None, None]),
        _convolution(layer, core, stride=layer.stride, padding=_padding(layer), dilation=layer.dilation),
        _convolution(layer, left[:, :, None, None], last=True),
    )
    return LowRank(OrderedDict(zip(("first", "core", "last"), factors, strict=True)))


def _fitted(layer: nn.Conv2d, first: Tensor, moments: Moments | None) -> tuple[Tensor, Tensor] | None:
    """Least-squares weights (o, m) on what a first factor (m, c kh kw) makes of all that the kernel reads.

    Returns:
        Also the covariance (m, m) of what they read; None where that of the kernel is not known.
    """
    reads = None if moments is None else moments.of_reads()
    if reads is None:
        return None
    seen = first @ reads[1]
    covariance = seen @ first.T
    covariance = covariance + 1e-9 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    wanted = layer.weight.detach().double().flatten(1) @ seen.T
    return torch.linalg.solve(covariance, wanted, left=False), covariance


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """V (r, c) and U (r', r) with matrix ~ U V, the singular values shared equally so that both train alike."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    scale: Tensor = s[:rank].sqrt()
    return scale[:, None] * v[:rank], u[:, :rank] * scale


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (n, rank), from the Gram matrix because the other side is far longer."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors[:, -rank:].flip(1)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(1e-12).sqrt()) @ vectors.T
    return root


def _unroot(factor: Tensor, root: Tensor | None) -> Tensor:
    """Undoes the whitening on a factor (r, c * p) or (r, c, p) whose channels were multiplied by `root`."""
    if root is None:
        return factor
    blocks = factor.reshape(factor.shape[0], len(root), -1).transpose(1, 2)
    solved: Tensor = torch.linalg.solve(root, blocks, left=False)
    return solved.transpose(1, 2).reshape(factor.shape)


def _linear(layer: nn.Linear, first: Tensor, second: Tensor) -> LowRank:
    factors = OrderedDict[str, nn.Module]()
    for name, weight, bias in (("first", first, None), ("second", second, layer.bias)):
        factors[name] = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, layer.weight.device)
        _fill(factors[name], weight, bias)
    return LowRank(factors)


def _convolution(
    layer: nn.Conv2d,
    weight: Tensor,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    last: bool = False,
) -> nn.Conv2d:
    outputs, inputs, height, width = weight.shape
    bias = layer.bias if last else None
    result = nn.Conv2d(
        inputs,
        outputs,
        (height, width),
        (stride[0], stride[1]),
        padding,
        (dilation[0], dilation[1]),
        bias=bias is not None,
        device=layer.weight.device,
    )
    _fill(result, weight, bias)
    return result


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        layer.get_parameter("weight").copy_(weight)
        if bias is not None:
            layer.get_parameter("bias").copy_(bias)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    padding = layer.padding
    assert not isinstance(padding, str)  # `propose` leaves out what is padded by name
    return padding[0], padding[1]


def _methods(layer: nn.Conv2d | nn.Linear) -> tuple[Method, ...]:
    return ("svd",) if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1) else ("spatial", "tucker")


def _shape(layer: nn.Conv2d | nn.Linear) -> tuple[int, int, int, int]:
    """(outputs, inputs, kernel height, kernel width)."""
    shape = (*layer.weight.shape, 1, 1)
    return shape[0], shape[1], shape[2], shape[3]


def _largest(method: Method, shape: tuple[int, int, int, int]) -> int:
    outputs, inputs, height, width = shape
    return min(outputs * width, inputs * height) if method == "spatial" else min(outputs, inputs)


def _fits(rank: Rank, shape: tuple[int, int, int, int]) -> bool:
    if rank.method == "tucker":
        return rank.ranks != (shape[1], shape[0])
    return rank.ranks[0] <= _largest(rank.method, shape)


def _aligned(rank: float, lanes: int) -> int:
    return max(1, round(rank / lanes)) * lanes
