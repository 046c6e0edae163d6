"""Rounding that looks at outputs: what one weight is rounded away, the weights not yet rounded take up (GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bit_widths import LEVELS
from .moments import Moments
from .quantize import Quantized
from .weight_only import WeightQuantized

# Channels after which those that are left take up the errors: all of them would be read and written for every one.
_TOGETHER = 64


def compensate(layer: Quantized | WeightQuantized, moments: Moments) -> None:
    """Moves a layer's weights onto their grid so that its outputs change least, in place.

    Weights are rounded in the order of the input's channels and taps; the error of each is spread over those that
    are left by the inverse of H, the second moments of what they multiply (Frantar et al. 2023, "GPTQ"; Hassibi and
    Stork 1993). Where H is not known as a whole (`Moments.patches`) it is the channels' covariance times that
    between taps, so that the Cholesky factor of its inverse is a product of two small ones. The bias takes up what
    the mean of the input then adds.

    Args:
        layer: Whole weights of its own, one group.
        moments: Of its input.
    """
    inner, levels = layer.inner, LEVELS[layer.bits]
    if isinstance(inner, nn.Conv2d) and (inner.groups > 1 or moments.taps.shape != inner.kernel_size):
        return
    weight = inner.weight.detach()
    reads = moments.of_reads() if isinstance(inner, nn.Conv2d) else None
    mean, covariance = (moments.mean.double(), moments.ridge().double()) if reads is None else reads
    # Where what a kernel reads is known as a whole, every tap of a channel is one of its own.
    channels = len(mean)
    wanted = weight.double().reshape(weight.shape[0], channels, -1)
    scale = layer.weight_scale(weight).double()[:, None]
    by_channel = _upper(covariance)
    between = _between(inner, moments, wanted.shape[2]) if reads is None else torch.ones(1, 1, dtype=torch.float64)
    by_tap = _upper(between)
    # In steps of the scale.
    left, whole = wanted / scale[..., None], torch.empty_like(wanted)
    for start in range(0, channels, _TOGETHER):
        end = min(start + _TOGETHER, channels)
        spread = torch.empty_like(left[:, start:end])
        for channel in range(start, end):
            own, errors = left[:, channel], torch.empty_like(left[:, channel])
            pivot = by_channel[channel, channel]
            for tap in range(own.shape[1]):
                rounded = own[:, tap].round().clamp(-levels, levels)
                whole[:, channel, tap] = rounded
                errors[:, tap] = (own[:, tap] - rounded) / (pivot * by_tap[tap, tap])
                own[:, tap + 1 :] -= errors[:, tap, None] * pivot * by_tap[tap, tap + 1 :]
            spread[:, channel - start] = errors @ by_tap
            ahead = by_channel[channel, channel + 1 : end, None]
            left[:, channel + 1 : end] -= ahead * spread[:, channel - start, None]
        # What is further ahead is read and written once for all of these.
        left[:, end:] -= torch.einsum("bj,obs->ojs", by_channel[start:end, end:], spread)
    _onto_grid(layer, whole, scale)
    if inner.bias is not None:
        missing = (wanted - whole * scale[..., None]).sum(2) @ mean
        with torch.no_grad():
            inner.bias += missing.to(inner.bias.dtype)


def _onto_grid(layer: Quantized | WeightQuantized, whole: Tensor, scale: Tensor) -> None:
    """The weights scale * whole, and the clip by which the layer finds that scale again."""
    weight = layer.inner.weight
    with torch.no_grad():
        weight.copy_((whole * scale[..., None]).reshape(weight.shape))
        largest = whole.abs().flatten(1).amax(1).clamp_min(1)
        layer.clip.copy_(LEVELS[layer.bits] / largest)


def _between(inner: nn.Conv2d | nn.Linear, moments: Moments, taps: int) -> Tensor:
    """The covariance between a channel's taps; the pixels of a flattened input count as independent."""
    return moments.between_taps() if isinstance(inner, nn.Conv2d) else torch.eye(taps, dtype=torch.float64)


def _upper(matrix: Tensor) -> Tensor:
    """U, upper triangular, with U^T U the inverse of a positive definite matrix."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    found: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return found
