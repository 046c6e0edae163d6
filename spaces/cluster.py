"""Weight sharing: a layer whose weights take few values, stored as a codebook and an index for every weight."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ITERATIONS = 100  # of Lloyd's algorithm; each costs O(k log n) on sorted weights
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class SharedWeight(nn.Module):
    """A weight that is looked up: codebook[indices]. The codebook (k,) is trained, the indices (uint8) stay."""

    indices: Tensor

    def __init__(self, codebook: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.codebook = nn.Parameter(codebook)
        self.register_buffer("indices", indices.to(torch.uint8))

    def forward(self) -> Tensor:
        flat = torch.index_select(self.codebook, 0, self.indices.flatten().long())
        return flat.reshape(self.indices.shape)


class SharedConv2d(nn.Conv2d):
    """A convolution with a shared weight; `weight` is None."""

    def __init__(self, layer: nn.Conv2d, shared: SharedWeight) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            (layer.kernel_size[0], layer.kernel_size[1]),
            (layer.stride[0], layer.stride[1]),
            layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1]),
            (layer.dilation[0], layer.dilation[1]),
            layer.groups,
            bias=False,
            padding_mode=layer.padding_mode,
            device="meta",
        )
        self.register_parameter("weight", None)
        self.bias = layer.bias
        self.shared = shared

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, weight_of(self), self.bias)


class SharedLinear(nn.Linear):
    """A linear layer with a shared weight; `weight` is None."""

    def __init__(self, layer: nn.Linear, shared: SharedWeight) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.register_parameter("weight", None)
        self.bias = layer.bias
        self.shared = shared

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, weight_of(self), self.bias)


def share(layer: nn.Conv2d | nn.Linear, entries: int) -> SharedConv2d | SharedLinear:
    """The layer with its weight replaced by the nearest of at most `entries` (<= 256) values, by k-means.

    The codebook has exactly `entries` values, used or not, so that its shape does not depend on the weights.
    (Han, Mao and Dally 2016, "Deep Compression".)
    """
    codebook = kmeans(layer.weight.detach().flatten(), entries)
    middles = (codebook[1:] + codebook[:-1]) / 2
    shared = SharedWeight(codebook, torch.bucketize(layer.weight.detach(), middles))
    return SharedLinear(layer, shared) if isinstance(layer, nn.Linear) else SharedConv2d(layer, shared)


def weight_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The layer's weight, looked up if it is shared."""
    if isinstance(layer, SharedConv2d | SharedLinear):
        weight: Tensor = layer.shared()
        return weight
    return layer.weight


def materialise(layer: SharedConv2d | SharedLinear) -> nn.Conv2d | nn.Linear:
    """A plain layer that computes the same."""
    weight = weight_of(layer).detach().clone()
    if isinstance(layer, SharedLinear):
        plain: nn.Conv2d | nn.Linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    else:
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            (layer.kernel_size[0], layer.kernel_size[1]),
            (layer.stride[0], layer.stride[1]),
            layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1]),
            (layer.dilation[0], layer.dilation[1]),
            layer.groups,
            bias=False,
            padding_mode=layer.padding_mode,
            device="meta",
        )
    plain.weight = nn.Parameter(weight)
    plain.bias = layer.bias
    return plain


def index_bits(entries: int) -> int:
    """The bits of one index into a codebook."""
    return max(1, (entries - 1).bit_length())


def worth_sharing(weights: int, entries: int) -> bool:
    """Whether indices and a float32 codebook take fewer bits than `weights` float32 values."""
    return weights * index_bits(entries) + 32 * entries < 32 * weights


def kmeans(values: Tensor, entries: int) -> Tensor:
    """The ascending centres (entries,) of the values (n,), by Lloyd's algorithm in one dimension.

    It starts from evenly spaced values, which keeps the rare large weights, and from quantiles, which serves the many
    small ones; the centres with the smaller squared error are returned. Nothing is random.
    """
    ordered = values.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    squares = torch.cat([ordered.new_zeros(1), ordered.square().cumsum(0)])
    spread = torch.linspace(float(ordered[0]), float(ordered[-1]), entries, dtype=torch.float64)
    ranks = ((torch.arange(entries, dtype=torch.float64) + 0.5) / entries * len(ordered)).long()
    fits = [_lloyd(ordered, sums, squares, start) for start in (spread, ordered[ranks])]
    return min(fits, key=lambda fit: fit[1])[0].to(values.dtype)


def _lloyd(ordered: Tensor, sums: Tensor, squares: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    ends = torch.tensor([len(ordered)])
    for _ in range(ITERATIONS):
        cuts = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, ends])
        counts, totals = edges.diff(), sums[edges].diff()
        new = torch.where(counts > 0, totals / counts.clamp_min(1), centres)  # an empty cluster stays where it is
        if torch.equal(new, centres):
            break
        centres = new
    error = squares[edges].diff() - 2 * centres * totals + counts * centres.square()
    return centres.sort().values, float(error.sum())
