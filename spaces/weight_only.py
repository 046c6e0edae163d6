"""Linear layers whose weights alone are whole numbers: where reading them takes the time, and inputs stay float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bit_widths import LEVELS
from .cluster import weight_of
from .integer import WeightOnlyLinear
from .rounding import column, round_through

CLIPS = torch.linspace(1.0, 0.4, 13)  # parts of the largest weight that are tried


class WeightQuantized(nn.Module):
    """A linear layer with whole weights and float32 inputs, simulated in float32.

    It computes y = (x q) s + bias, q = clamp(round(weight / s), -L, L), L = 127 or 7, with one scale s an output
    channel: `clip` (o,) is the part of a channel's largest magnitude that L stands for. In training mode the scales are
    part of the weights. Gradients pass the rounding unchanged.
    """

    clip: Tensor

    def __init__(self, inner: nn.Linear, bits: int) -> None:
        super().__init__()
        if bits not in LEVELS:
            raise ValueError(f"{bits} bits are not supported; known are {', '.join(map(str, sorted(LEVELS)))}")
        self.inner, self.bits = inner, bits
        self.register_buffer("clip", _best_clip(weight_of(inner).detach(), bits))

    def forward(self, x: Tensor) -> Tensor:
        weight = weight_of(self.inner)
        scale = self.weight_scale(weight.detach())
        whole = _whole(weight / column(scale, weight), self.bits)
        if self.training:
            return F.linear(x, whole * column(scale, whole), self.inner.bias)
        sums = F.linear(x, whole) * scale
        return sums if self.inner.bias is None else sums + self.inner.bias

    def weight_scale(self, weight: Tensor) -> Tensor:
        """The scale (o,) of each output channel."""
        return _scale(weight, self.clip, self.bits)

    def integer(self) -> WeightOnlyLinear:
        """The same layer with int8 weights, calling `planish::wlinear`."""
        weight = weight_of(self.inner).detach()
        scale = self.weight_scale(weight)
        whole = _whole(weight / column(scale, weight), self.bits).to(torch.int8)
        bias = torch.zeros_like(scale) if self.inner.bias is None else self.inner.bias.detach().clone()
        return WeightOnlyLinear(whole, scale, bias)


def _scale(weight: Tensor, clip: Tensor, bits: int) -> Tensor:
    return (weight.abs().amax(1) * clip / LEVELS[bits]).clamp_min(1e-12)


def _whole(steps: Tensor, bits: int) -> Tensor:
    # Rounded first: the largest weight lies at the limit, and one that is cut off there would learn no more.
    return torch.clamp(round_through(steps), -LEVELS[bits], LEVELS[bits])


def _best_clip(weight: Tensor, bits: int) -> Tensor:
    """For every output channel the part of its largest weight that gives the least squared error, (o,)."""
    errors = []
    for clip in CLIPS:
        scale = column(_scale(weight, clip, bits), weight)
        errors.append((_whole(weight / scale, bits) * scale - weight).square().sum(1))
    return CLIPS[torch.stack(errors).argmin(0)].clone()
