"""The exact integer operators that quantised layers are exported with, and the layers that call them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

EXACT_FLOAT32 = 2**24  # every integer up to here is a float32, so a sum below it has no rounding

_SCHEMAS = {
    "planish::quantize": "(Tensor x, float scale, int zero_point) -> Tensor",
    "planish::qconv2d": "(Tensor x, Tensor weight, Tensor scale, Tensor bias, int zero_point,"
    " int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    "planish::qlinear": "(Tensor x, Tensor weight, Tensor scale, Tensor bias, int zero_point) -> Tensor",
    "planish::wlinear": "(Tensor x, Tensor weight, Tensor scale, Tensor bias) -> Tensor",
}


@torch.library.custom_op("planish::quantize", mutates_args=(), schema=_SCHEMAS["planish::quantize"])
def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """clamp(round(x * (1 / scale)) + zero_point, 0, 255) as uint8; halves round to even, both products are float32.

    A factor and not a divisor, as torch's own quantisation has it: CPUs divide vectors ten times slower.
    """
    steps = torch.round(x * (1 / torch.tensor(scale, dtype=torch.float32)))
    return torch.clamp(steps + zero_point, 0, 255).to(torch.uint8)


@torch.library.custom_op("planish::qconv2d", mutates_args=(), schema=_SCHEMAS["planish::qconv2d"])
def qconv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """float32(sum (x - zero_point) * weight) * scale + bias, the sum exact; padding counts as x = zero_point.

    Args:
        x: uint8 (n, c, h, w).
        weight: int8 (o, c / groups, kh, kw).
        scale: float32 (o,), the input's scale times the weight's.
        bias: float32 (o,).
    """
    kind = _exact_dtype(weight)
    steps = x.to(kind) - zero_point
    total = F.conv2d(steps, weight.to(kind), None, list(stride), list(padding), list(dilation), groups)
    return total.float() * scale[:, None, None] + bias[:, None, None]


@torch.library.custom_op("planish::qlinear", mutates_args=(), schema=_SCHEMAS["planish::qlinear"])
def qlinear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, zero_point: int) -> Tensor:
    """float32(sum (x - zero_point) * weight) * scale + bias, the sum exact.

    Args:
        x: uint8 (..., i).
        weight: int8 (o, i).
        scale: float32 (o,), the input's scale times the weight's.
        bias: float32 (o,).
    """
    kind = _exact_dtype(weight)
    return F.linear(x.to(kind) - zero_point, weight.to(kind)).float() * scale + bias


@torch.library.custom_op("planish::wlinear", mutates_args=(), schema=_SCHEMAS["planish::wlinear"])
def wlinear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(sum x * weight) * scale + bias in float32.

    Args:
        x: float32 (..., i).
        weight: int8 (o, i).
        scale: float32 (o,), the weight's.
        bias: float32 (o,).
    """
    return F.linear(x, weight.float()) * scale + bias


class IntegerConv2d(nn.Module):
    """A convolution in integers: quantises its float input, returns floats."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self, layer: nn.Conv2d, weight: Tensor, scale: Tensor, bias: Tensor, input_scale: float, zero_point: int
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.input_scale, self.zero_point = input_scale, zero_point
        assert not isinstance(layer.padding, str)  # `propose` leaves out what is padded by name
        self.stride, self.padding, self.dilation = list(layer.stride), list(layer.padding), list(layer.dilation)
        self.groups = layer.groups

    def forward(self, x: Tensor) -> Tensor:
        steps = quantize(x, self.input_scale, self.zero_point)
        where = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = qconv2d(steps, self.weight, self.scale, self.bias, self.zero_point, *where)
        return result


class IntegerLinear(nn.Module):
    """A linear layer in integers: quantises its float input, returns floats."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, input_scale: float, zero_point: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.input_scale, self.zero_point = input_scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        steps = quantize(x, self.input_scale, self.zero_point)
        result: Tensor = qlinear(steps, self.weight, self.scale, self.bias, self.zero_point)
        return result


class WeightOnlyLinear(nn.Module):
    """A linear layer with int8 weights on float inputs."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = wlinear(x, self.weight, self.scale, self.bias)
        return result


def _exact_dtype(weight: Tensor) -> torch.dtype:
    """float32 if no sum of products with 0..255 can reach 2^24, else float64, which holds every 32-bit sum."""
    largest = 255 * int(weight.flatten(1).long().abs().sum(1).max()) if weight.numel() else 0
    return torch.float32 if largest < EXACT_FLOAT32 else torch.float64


def empty_convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """A float32 tensor of the shape that the convolution has."""
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *sizes), dtype=torch.float32)


def convolution_flops(x: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """Two operations for every multiply-accumulate of a convolution, as torch counts them."""
    return 2 * out_shape.numel() * weight[1:].numel()


def linear_flops(x: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """The same of a linear layer."""
    return 2 * out_shape.numel() * weight[1]


@quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@qconv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return empty_convolution(x, weight, stride, padding, dilation)


@qlinear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, zero_point: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@wlinear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register_flop_formula(torch.ops.planish.qconv2d)(convolution_flops)
register_flop_formula([torch.ops.planish.qlinear, torch.ops.planish.wlinear])(linear_flops)
