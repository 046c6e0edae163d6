"""Layers that multiply bfloat16 numbers: float32's range in half the bytes, for CPUs that multiply pairs of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .bfloat16_ops import Bfloat16Conv2d, Bfloat16Linear, rounded
from .cluster import weight_of
from .rounding import through


class Bfloat16(nn.Module):
    """A convolution or linear layer whose inputs and weights are rounded to bfloat16, simulated in float32.

    Products of two bfloat16 numbers are float32 numbers, and so are their sums, the bias and the result. Gradients
    pass the rounding unchanged.
    """

    def __init__(self, inner: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        if not pairs(inner):
            raise ValueError("a depthwise convolution sums no channels, so that pairs of bfloat16 would not pay")
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner, weight = self.inner, through(weight_of(self.inner), rounded)
        # The gradient of a cast would be rounded too.
        x = through(x, rounded)
        if isinstance(inner, nn.Linear):
            return F.linear(x, weight, inner.bias)
        return F.conv2d(x, weight, inner.bias, inner.stride, inner.padding, inner.dilation, inner.groups)

    def deployed(self) -> Bfloat16Conv2d | Bfloat16Linear:
        """The same layer, calling `planish::bconv2d` or `planish::blinear` on rounded weights."""
        inner, weight = self.inner, rounded(weight_of(self.inner).detach())
        bias = weight.new_zeros(len(weight)) if inner.bias is None else inner.bias.detach().clone()
        if isinstance(inner, nn.Linear):
            return Bfloat16Linear(weight, bias)
        return Bfloat16Conv2d(inner, weight, bias)


def pairs(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether a layer sums over channels, of which a step takes two: any but a depthwise convolution does."""
    return not (isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1)
