"""The mean of a layer's outputs, which a replacement that was fitted to covariances alone need not keep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cluster import weight_of
from .moments import Moments


def keep_mean(old: nn.Conv2d | nn.Linear, new: nn.Module, moments: Moments | None) -> None:
    """Moves the bias of what replaces a layer so that the mean input gives what it gave, in place.

    Without a bias nothing is done: the batch norm behind such a layer takes the mean up.

    Args:
        old: The layer.
        new: What replaces it: a layer, or layers one after the other whose last has the bias.
        moments: Of the input, where they are known.
    """
    layers = [layer for layer in new.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    bias = layers[-1].bias if layers else None
    if moments is None or bias is None:
        return
    width = old.in_channels if isinstance(old, nn.Conv2d) else old.in_features
    with torch.no_grad():
        given = moments.mean.repeat_interleave(width // len(moments.mean))
        found = given
        for layer in layers:
            found = _response(layer, found)
        layers[-1].bias = nn.Parameter(bias + _response(old, given) - found, bias.requires_grad)


def _response(layer: nn.Conv2d | nn.Linear, constant: Tensor) -> Tensor:
    """What the weights make of a constant input (c,), away from an image's borders: (o,)."""
    weight = weight_of(layer)
    if isinstance(layer, nn.Linear):
        return F.linear(constant, weight)
    return F.conv2d(constant[None, :, None, None], weight.sum((2, 3), keepdim=True), groups=layer.groups).flatten()
