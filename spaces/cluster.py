"""Weight sharing: a layer whose weights take few values, stored as a codebook and an index for every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOVES = 16  # of a centre to another place in k-means
ITERATIONS = 50  # of Lloyd's algorithm after each; large layers gain nothing from more


class _LookUp(torch.autograd.Function):
    """codebook[indices], whose gradient is the mean over an entry's weights.

    A step then is the nearest to the plain weights' own step that keeps them shared. With the sum, which is the
    derivative, an entry of two thousand weights moved by two thousand times as much at the same learning rate, away
    from what k-means had found.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor) -> Tensor:
        flat = indices.flatten().long()
        ctx.save_for_backward(flat)
        ctx.entries = len(codebook)
        return torch.index_select(codebook, 0, flat).reshape(indices.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        own = gradients[0].flatten()
        summed = own.new_zeros(ctx.entries).index_add_(0, flat, own)
        return summed / torch.bincount(flat, minlength=ctx.entries).clamp(min=1), None


class SharedWeight(nn.Module):
    """A weight that is looked up: codebook[indices]. The codebook (k,) is trained, the indices (uint8) stay."""

    indices: Tensor

    def __init__(self, codebook: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.codebook = nn.Parameter(codebook)
        self.register_buffer("indices", indices.to(torch.uint8))

    def forward(self) -> Tensor:
        found: Tensor = _LookUp.apply(self.codebook, self.indices)  # type: ignore[no-untyped-call]
        return found


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
        output: Tensor = self._conv_forward(input, weight_of(self), self.bias)
        return output


class SharedLinear(nn.Linear):
    """A linear layer with a shared weight; `weight` is None."""

    def __init__(self, layer: nn.Linear, shared: SharedWeight) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.register_parameter("weight", None)
        self.bias = layer.bias
        self.shared = shared

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, weight_of(self), self.bias)


def share(
    layer: nn.Conv2d | nn.Linear, entries: int, fitted: bool = True, importance: Tensor | None = None
) -> SharedConv2d | SharedLinear:
    """The layer with its weight replaced by the nearest of at most `entries` (<= 256) values, by k-means.

    The codebook has exactly `entries` values, used or not, so that its shape does not depend on the weights.
    (Han, Mao and Dally 2016, "Deep Compression".) Not `fitted`, it is where k-means would begin: structure alone.

    Args:
        layer: Left as it is.
        entries: Of the codebook.
        fitted: See above.
        importance: How much a weight's squared error counts, in a shape that broadcasts to the weight's: the variance
            of the input that it multiplies. By default all count alike.
    """
    values = layer.weight.detach().flatten()
    counts = None if importance is None else importance.expand(layer.weight.shape).flatten()
    codebook = kmeans(values, entries, counts) if fitted else _quantiles(values.sort().values, entries)
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


def kmeans(values: Tensor, entries: int, importance: Tensor | None = None) -> Tensor:
    """The ascending centres (entries,) of the values (n,), by Lloyd's algorithm in one dimension.

    It starts from quantiles, which serves the many small weights, and from evenly spaced values, which keeps the rare
    large ones, and returns the better result. Nothing is random.

    Args:
        values: What is to be represented.
        entries: How many centres.
        importance: What each value's squared error counts, (n,), none below 0; by default all count alike.
    """
    ordered, order = values.double().sort()
    counts = torch.ones_like(ordered)
    if importance is not None:
        # Relative to their mean, so that nothing depends on the unit, and none is quite without.
        counts = importance.double()[order]
        counts = counts / counts.mean().clamp_min(1e-30) + 1e-6
    points = _Points(
        ordered, *(torch.cat([ordered.new_zeros(1), part.cumsum(0)]) for part in (counts, counts * ordered))
    )
    even = torch.linspace(float(ordered[0]), float(ordered[-1]), entries, dtype=torch.float64)
    fits = [_improved(points, *_lloyd(points, start)) for start in (_quantiles(ordered, entries), even)]
    return max(fits, key=lambda fit: _explained(points, *fit))[0].to(values.dtype)


@dataclass(frozen=True, eq=False)
class _Points:
    """Ascending values, and the sums up to each of what they count (`mass`) and of that times them (`sums`)."""

    ordered: Tensor
    mass: Tensor
    sums: Tensor


def _quantiles(ordered: Tensor, entries: int) -> Tensor:
    ranks = ((torch.arange(entries, dtype=torch.float64) + 0.5) / entries * len(ordered)).long()
    return ordered[ranks]


def _improved(points: _Points, centres: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Centres after up to `MOVES` moves of a centre to where it helps more, as long as the squared error falls."""
    for _ in range(MOVES):
        moved = _move(points, centres, edges)
        if moved is None:
            break
        other = _lloyd(points, moved)
        if _explained(points, *other) <= _explained(points, centres, edges):
            break
        centres, edges = other
    return centres, edges


def _lloyd(points: _Points, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending centres that are the means of the sorted values nearest to them, and where each one's values begin."""
    ordered, sums = points.ordered, points.sums
    first, last = torch.tensor([0]), torch.tensor([len(ordered)])
    for _ in range(ITERATIONS):
        centres = centres.sort().values
        edges = torch.cat([first, torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2), last])
        counts = points.mass[edges].diff()
        new = torch.where(counts > 0, sums[edges].diff() / counts.clamp_min(1e-30), centres)  # an empty one stays
        if torch.allclose(new, centres, rtol=1e-12, atol=0):
            break
        centres = new
    return new, edges


def _move(points: _Points, centres: Tensor, edges: Tensor) -> Tensor | None:
    """Merges the two neighbours that cost least and splits the cluster that gains most; None if that does not pay."""
    ordered, mass, sums = points.ordered, points.mass, points.sums
    counts = mass[edges].diff()
    merged = counts[1:] * counts[:-1] / (counts[1:] + counts[:-1]).clamp_min(1e-30) * centres.diff().square()
    pair = int(merged.argmin())
    middle = torch.searchsorted(ordered, centres).clamp(edges[:-1], edges[1:])
    below, above = mass[middle] - mass[edges[:-1]], mass[edges[1:]] - mass[middle]
    low = (sums[middle] - sums[edges[:-1]]) / below.clamp_min(1e-30)
    high = (sums[edges[1:]] - sums[middle]) / above.clamp_min(1e-30)
    gained = below * above / counts.clamp_min(1e-30) * (high - low).square()
    gained[pair : pair + 2] = 0
    split = int(gained.argmax())
    if not float(gained[split]) > float(merged[pair]):
        return None
    total = counts[pair] + counts[pair + 1]
    both = (sums[edges[pair + 2]] - sums[edges[pair]]) / total if total > 0 else centres[pair]
    moved = centres.clone()
    moved[pair], moved[split], moved[pair + 1] = both, low[split], high[split]
    return moved


def _explained(points: _Points, centres: Tensor, edges: Tensor) -> float:
    """The part of the sum of squares that the centres explain; the squared error is the rest."""
    return float((points.mass[edges].diff() * centres.square()).sum())
