"""The operators that layers of bfloat16 numbers are exported with, and the layers that call them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .integer import convolution_flops, empty_convolution, linear_flops

_SCHEMAS = {
    "planish::bfloat16": "(Tensor x) -> Tensor",
    "planish::bconv2d": "(Tensor x, Tensor weight, Tensor bias, int[] stride, int[] padding, int[] dilation,"
    " int groups) -> Tensor",
    "planish::blinear": "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
}


@torch.library.custom_op("planish::bfloat16", mutates_args=(), schema=_SCHEMAS["planish::bfloat16"])
def bfloat16(x: Tensor) -> Tensor:
    """The nearest bfloat16 of every float32, halves to even."""
    return x.to(torch.bfloat16)


@torch.library.custom_op("planish::bconv2d", mutates_args=(), schema=_SCHEMAS["planish::bconv2d"])
def bconv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution of x with the nearest bfloat16 of every weight, and the bias: products and sums in float32.

    Args:
        x: bfloat16 (n, c, h, w).
        weight: float32 (o, c / groups, kh, kw).
        bias: float32 (o,).
    """
    return F.conv2d(x.float(), rounded(weight), bias, list(stride), list(padding), list(dilation), groups)


@torch.library.custom_op("planish::blinear", mutates_args=(), schema=_SCHEMAS["planish::blinear"])
def blinear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x times the nearest bfloat16 of every weight, and the bias: products and sums in float32.

    Args:
        x: bfloat16 (..., i).
        weight: float32 (o, i).
        bias: float32 (o,).
    """
    return F.linear(x.float(), rounded(weight), bias)


def rounded(x: Tensor) -> Tensor:
    """The nearest bfloat16 of every float32 as float32, halves to even."""
    return x.to(torch.bfloat16).float()


class Bfloat16Conv2d(nn.Module):
    """A convolution of bfloat16 numbers: rounds its float32 input, returns float32."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        assert not isinstance(layer.padding, str)  # `propose` leaves out what is padded by name
        self.stride, self.padding, self.dilation = list(layer.stride), list(layer.padding), list(layer.dilation)
        self.groups = layer.groups

    def forward(self, x: Tensor) -> Tensor:
        where = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = bconv2d(bfloat16(x), self.weight, self.bias, *where)
        return result


class Bfloat16Linear(nn.Module):
    """A linear layer of bfloat16 numbers: rounds its float32 input, returns float32."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = blinear(bfloat16(x), self.weight, self.bias)
        return result


@bfloat16.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.bfloat16)


@bconv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return empty_convolution(x, weight, stride, padding, dilation)


@blinear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


register_flop_formula(torch.ops.planish.bconv2d)(convolution_flops)
register_flop_formula(torch.ops.planish.blinear)(linear_flops)
