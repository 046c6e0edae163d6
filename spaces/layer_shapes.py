"""The layers that would stand at a site, known from shapes alone: what latency, size and MACs of an option depend on.

These are the rules of `apply` for one site, without weights; a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
from torch import nn

from .bit_widths import BFLOAT16, WEIGHT_ONLY
from .blocks import group_count
from .cluster import index_bits, worth_sharing
from .lowrank import Extent, Rank, fit_rank
from .size import SCALE_BYTES, ZERO_POINT_BYTES
from .space import Kind, Option


@dataclass(frozen=True)
class LayerShape:
    """A convolution or linear layer: its channels, kernel and pixels, and how its weights are held.

    A linear layer has a kernel of (1, 1) and (rows, 1) pixels. `groups` equal to both channel counts is depthwise.

    Attributes:
        bits: Of the multiplications; 32 is float32.
        stored_bits: Of a weight, where it is not shared.
        entries: Of the codebook that the weights share; 0 without one.
    """

    op: str
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    reads: tuple[int, int]
    bias: bool
    bits: int = 32
    stored_bits: int = 32
    entries: int = 0

    @property
    def writes(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        found = []
        for size, kernel, stride, padding, dilation in zip(
            self.reads, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            found.append((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        return found[0], found[1]

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved alone."""
        return self.groups == self.inputs > 1

    @property
    def weights(self) -> int:
        """The number of weights."""
        return self.outputs * self.inputs // self.groups * prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        return self.weights * prod(self.writes)

    @property
    def stored_bytes(self) -> int:
        """Of the weights with their scales or codebook and of the bias; see `size.stored_bytes`."""
        constants = 4 * self.outputs if self.bias else 0
        shared = self.entries * 4 + _packed(self.weights * index_bits(self.entries)) if self.entries else None
        plain = _packed(self.weights * self.stored_bits)
        if self.stored_bits < 16:
            constants += self.outputs * SCALE_BYTES
            if self.bits < 32:  # the input's scale and zero point
                constants += SCALE_BYTES + ZERO_POINT_BYTES
        if self.stored_bits < 32:
            return constants + (plain if shared is None else min(plain, shared))
        return constants + (plain if shared is None else shared)


def shape_of(layer: nn.Conv2d | nn.Linear, reads: tuple[int, int]) -> LayerShape:
    """The shape of a layer that reads an image of so many rows and columns, or (rows, 1) if it is linear."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        one, none = (1, 1), (0, 0)
        return LayerShape("linear", layer.in_features, layer.out_features, one, one, none, one, 1, reads, bias)
    assert not isinstance(layer.padding, str)
    return LayerShape(
        "conv2d", layer.in_channels, layer.out_channels, _two(layer.kernel_size), _two(layer.stride),
        _two(layer.padding), _two(layer.dilation), layer.groups, reads, bias,
    )  # fmt: skip


def layers_at(
    layer: LayerShape, options: Mapping[Kind, Option], lanes: int, same_channels: bool
) -> tuple[LayerShape, ...]:
    """The layers that stand at a site with the options of every kind but PRUNE; none where it is dropped.

    Args:
        layer: The site's layer, as wide as pruning has left it.
        options: By kind; a missing one is None.
        lanes: Of the proposal.
        same_channels: Whether its input and output channels are the same ones.
    """
    kinds = (Kind.BLOCK, Kind.RANK, Kind.CLUSTER, Kind.BITS)
    return _standing(layer, tuple(options.get(kind) for kind in kinds), lanes, same_channels)


# A model has few shapes and many layers.
@lru_cache(maxsize=1 << 16)
def _standing(
    layer: LayerShape, options: tuple[Option, ...], lanes: int, same_channels: bool
) -> tuple[LayerShape, ...]:
    block, rank, entries, bits = options
    found = _block(layer, block, lanes, same_channels)
    if rank is not None and found and found[-1].groups == 1:
        # What can be factorised is the layer itself, or the 1x1 convolution at the end of a separable block.
        found = (*found[:-1], *_factors(found[-1], Rank.parse(str(rank))))
    if entries is not None:
        found = tuple(
            replace(part, entries=int(entries)) if worth_sharing(part.weights, int(entries)) else part for part in found
        )
    if bits == BFLOAT16:
        found = tuple(part if part.depthwise else replace(part, bits=16, stored_bits=16) for part in found)
    elif bits in WEIGHT_ONLY:
        found = tuple(replace(part, stored_bits=WEIGHT_ONLY[str(bits)]) for part in found)
    elif bits is not None:
        found = tuple(replace(part, bits=8, stored_bits=int(bits)) for part in found)
    return found


def _block(layer: LayerShape, option: Option, lanes: int, same_channels: bool) -> tuple[LayerShape, ...]:
    if option is None:
        return (layer,)
    if option == "separable":
        depthwise = replace(layer, outputs=layer.inputs, groups=layer.inputs, bias=False)
        return depthwise, _one_by_one(layer, layer.writes)
    if option == "grouped":
        groups = group_count(layer.inputs, layer.outputs, lanes)
        if groups == 1 and layer.inputs % 2 == 0 and layer.outputs % 2 == 0:
            groups = 2
        return (replace(layer, groups=groups),)
    if option == "identity" and same_channels and layer.inputs == layer.outputs:
        return ()
    return (replace(_one_by_one(layer, layer.reads), stride=layer.stride),)


def _one_by_one(layer: LayerShape, reads: tuple[int, int]) -> LayerShape:
    return replace(layer, kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), reads=reads)


@lru_cache(maxsize=8192)  # asked for again with every codebook and width of numbers
def _factors(layer: LayerShape, wanted: Rank) -> tuple[LayerShape, ...]:
    with torch.device("meta"):
        module: nn.Conv2d | nn.Linear = (
            nn.Linear(layer.inputs, layer.outputs)
            if layer.op == "linear"
            else nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, layer.dilation)
        )
    rank = fit_rank(wanted, module, Extent(layer.reads, layer.writes))
    if rank is None:
        return (layer,)
    first = rank.ranks[0]
    if rank.method == "tucker":
        last = rank.ranks[1]
        return (
            replace(_one_by_one(layer, layer.reads), outputs=first, bias=False),
            replace(layer, inputs=first, outputs=last, bias=False),
            replace(_one_by_one(layer, layer.writes), inputs=last),
        )
    if rank.method == "spatial":
        (tall, wide), (down, across), (top, left) = layer.kernel, layer.stride, layer.padding
        (dy, dx), between = layer.dilation, (layer.writes[0], layer.reads[1])
        return (
            replace(
                layer, outputs=first, kernel=(tall, 1), stride=(down, 1), padding=(top, 0), dilation=(dy, 1),
                bias=False,
            ),
            replace(
                layer, inputs=first, kernel=(1, wide), stride=(1, across), padding=(0, left), dilation=(1, dx),
                reads=between,
            ),
        )  # fmt: skip
    return (
        replace(layer, outputs=first, bias=False),
        replace(_one_by_one(layer, layer.writes), inputs=first),
    )


def _packed(bits: int) -> int:
    return (bits + 7) // 8


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]
