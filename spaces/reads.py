"""Places of layers' inputs and outputs that are looked at, and what a layer reads there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def places(count: int, wanted: int) -> slice | Tensor:
    """So many of `count` positions, the same ones every time, or all where they are no more.

    At random: every n-th position of an image lies in the same few columns where n and the image's width share a
    factor, and what lies at its border is not what lies inside.
    """
    if count <= wanted:
        return slice(None)
    return torch.randint(count, (wanted,), generator=torch.Generator().manual_seed(count)).sort().values


def reads_of(layer: nn.Conv2d | nn.Linear, value: Tensor, count: int) -> Tensor | None:
    """What a layer's weights multiply at so many places of its output (`places`), (c kh kw, count).

    None for groups, and for what is padded otherwise than with zeros.
    """
    if isinstance(layer, nn.Linear):
        vectors = value.reshape(-1, value.shape[-1]).T
        return vectors[:, places(vectors.shape[1], count)]
    if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str) or value.ndim != 4:
        return None
    (top, aside), (down, across), (dy, dx) = layer.padding, layer.stride, layer.dilation
    height, width = layer.kernel_size
    padded = F.pad(value, (aside, aside, top, top)).contiguous()
    images, channels = value.shape[:2]
    rows = (padded.shape[2] - dy * (height - 1) - 1) // down + 1
    columns = (padded.shape[3] - dx * (width - 1) - 1) // across + 1
    one, channel, row, column = padded.stride()
    # Every place's patch without a copy of any.
    patches = padded.as_strided(
        (images, rows, columns, channels, height, width),
        (one, row * down, column * across, channel, row * dy, column * dx),
    )
    total = images * rows * columns
    chosen = places(total, count)
    flat = torch.arange(total)[chosen]
    picked = patches[flat // (rows * columns), flat // columns % rows, flat % columns]
    return picked.flatten(1).T
