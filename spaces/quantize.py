"""Layers that compute in integers: simulated in floats for training, exported as integer operators."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .aliases import put
from .bfloat16 import Bfloat16
from .bfloat16_ops import Bfloat16Conv2d, Bfloat16Linear
from .bit_widths import LEVELS, PAIRS
from .cluster import SharedConv2d, SharedLinear, materialise, weight_of
from .integer import IntegerConv2d, IntegerLinear, WeightOnlyLinear, qconv2d, qlinear, quantize
from .moments import batches, run, watching
from .reads import places
from .rounding import column, round_through
from .weight_only import WeightQuantized

__all__ = ["LEVELS", "PAIRS", "Quantized", "Range", "deploy", "input_ranges", "qconv2d", "qlinear", "quantize"]

INPUT_LEVELS = 255
MOMENTUM = 0.01  # of the input range in training
SAMPLE = 32768  # values of a layer's input that choose its range
CLIPS = torch.linspace(1.0, 0.3, 15)  # parts of the full range that are tried


@dataclass(frozen=True)
class Range:
    """The values that a layer's input takes, and the part of that range which is worth 255 steps."""

    low: float
    high: float
    shrink: float = 1.0


class Quantized(nn.Module):
    """A convolution or linear layer with integer weights and inputs, simulated in float32.

    The forward pass computes with integers: the input as q = clamp(round(x (1 / s)) + z, 0, 255) - z, the weight as
    round(w / s_o), limited, with one scale an output channel, and y = (q * w) s s_o + bias. Weights of 4 bits are at
    most 7. Of 8 bits the inputs 2i and 2i + 1 are limited together, or where a convolution has one input channel, the
    columns 2i and 2i + 1 of its kernel: their two weights, where the sum of their
    magnitudes exceeds 127, are shortened to it in proportion before they are rounded, so that it is at most 128. The
    sum q * w of integers held in float32 is exact below 2^24; above, it may differ from the exported integer operator
    by float32's rounding. In training mode the scales are part of the weights, and the sum is rounded as any other is.
    Gradients pass the rounding unchanged (straight-through, Bengio et al. 2013), and are zero where inputs are clipped.

    The weight's scale follows the weight: `clip` (o,) is the part of a channel's largest magnitude, or of its largest
    sum of two, that the limit stands for.
    The input's range `low`, `high` (scalars, low <= 0 <= high) follows the inputs in training mode by a moving average
    of `shrink` times the range of the batch (Jacob et al. 2018), and stays in eval mode.
    """

    clip: Tensor
    low: Tensor
    high: Tensor
    shrink: Tensor

    def __init__(self, inner: nn.Conv2d | nn.Linear, bits: int, seen: Range) -> None:
        super().__init__()
        if bits not in LEVELS:
            raise ValueError(f"{bits} bits are not supported; known are {', '.join(map(str, sorted(LEVELS)))}")
        self.inner = inner
        self.bits = bits
        self.register_buffer("clip", _best_clip(weight_of(inner).detach(), bits, _axis(inner)))
        self.register_buffer("low", torch.tensor(min(0.0, seen.low * seen.shrink), dtype=torch.float32))
        self.register_buffer("high", torch.tensor(max(0.0, seen.high * seen.shrink), dtype=torch.float32))
        self.register_buffer("shrink", torch.tensor(seen.shrink, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._follow(x.detach())
        input_scale, zero_point = self.input_scale()
        steps = _steps(x, input_scale, zero_point)
        weight = weight_of(self.inner)
        weight_scale = self.weight_scale(weight.detach())
        whole = _whole(weight / column(weight_scale, weight), self.bits, _axis(self.inner))
        scale = input_scale * weight_scale
        bias = self.inner.bias
        if self.training:
            # The weights are fewer than the outputs, which would be read and written twice more, and their gradients.
            return self._sums(steps, whole * column(scale, whole), bias)
        bias = torch.zeros_like(weight_scale) if bias is None else bias
        if isinstance(self.inner, nn.Linear):
            return self._sums(steps, whole, None) * scale + bias
        return self._sums(steps, whole, None) * scale[:, None, None] + bias[:, None, None]

    def _sums(self, steps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inner = self.inner
        if isinstance(inner, nn.Linear):
            return F.linear(steps, weight, bias)
        return F.conv2d(steps, weight, bias, inner.stride, inner.padding, inner.dilation, inner.groups)

    def input_scale(self) -> tuple[Tensor, Tensor]:
        """The float32 scale and the integer-valued zero point (0..255) of the input."""
        scale = ((self.high - self.low) / INPUT_LEVELS).clamp_min(1e-12)
        return scale, torch.clamp(torch.round(-self.low / scale), 0, INPUT_LEVELS)

    def weight_scale(self, weight: Tensor) -> Tensor:
        """The scale (o,) of each output channel."""
        return (_peak(weight, self.bits, _axis(self.inner)) * self.clip / LEVELS[self.bits]).clamp_min(1e-12)

    def integer(self) -> IntegerConv2d | IntegerLinear:
        """The same layer with int8 weights, calling the integer operators."""
        weight = weight_of(self.inner).detach()
        weight_scale = self.weight_scale(weight)
        whole = _whole(weight / column(weight_scale, weight), self.bits, _axis(self.inner)).to(torch.int8)
        scale, zero_point = self.input_scale()
        bias = torch.zeros_like(weight_scale) if self.inner.bias is None else self.inner.bias.detach().clone()
        values = (whole, scale * weight_scale, bias, float(scale), int(zero_point))
        return IntegerLinear(*values) if isinstance(self.inner, nn.Linear) else IntegerConv2d(self.inner, *values)

    def _follow(self, x: Tensor) -> None:
        low, high = torch.aminmax(_in_memory_order(x))
        self.low.lerp_(low.clamp_max(0) * self.shrink, MOMENTUM)
        self.high.lerp_(high.clamp_min(0) * self.shrink, MOMENTUM)


def deploy(module: nn.Module) -> nn.Module:
    """A copy in eval mode that torch.export sees as it will be computed.

    Quantised layers call `planish::quantize` and `planish::qconv2d` or `planish::qlinear` on int8 weights, or
    `planish::wlinear` where weights alone are quantised, layers of bfloat16 `planish::bfloat16` and `planish::bconv2d`
    or `planish::blinear`; shared weights are written out.
    """
    result = copy.deepcopy(module).eval().requires_grad_(False)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, Quantized | WeightQuantized):
            put(result, name, layer.integer())
        elif isinstance(layer, Bfloat16):
            put(result, name, layer.deployed())
        elif isinstance(layer, SharedConv2d | SharedLinear) and not _inside_quantized(result, name):
            put(result, name, materialise(layer).requires_grad_(False))
    return result.eval()


def input_ranges(module: nn.Module, names: Mapping[str, object], inputs: Tensor) -> dict[str, Range]:
    """The range of every named layer's input when the module runs on `inputs`, shape (n, ...).

    `shrink` is the part of the range whose 255 steps represent a sample of the values with the least squared error.
    """
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    samples: dict[str, list[Tensor]] = {}
    share = SAMPLE // len(batches(inputs))

    def see(name: str, value: Tensor) -> None:
        low, high = torch.aminmax(value)
        lows[name] = min(lows.get(name, 0.0), float(low))
        highs[name] = max(highs.get(name, 0.0), float(high))
        flat = value.flatten()
        samples.setdefault(name, []).append(flat[places(len(flat), share)].clone())

    with watching(module, names, see):
        run(module, inputs)
    return {
        name: Range(lows[name], highs[name], _best_shrink(torch.cat(parts), lows[name], highs[name]))
        for name, parts in samples.items()
    }


class _Steps(torch.autograd.Function):
    """clamp(round(x / scale) + zero, 0, 255) - zero; the gradient passes where nothing is clipped.

    One function, because each of these operations would read and write the whole input, forwards and backwards. The
    scale and zero are numbers, for which every layer would have to wait on a GPU; there it is `_StepsOfTensors`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale, ctx.zero = scale, zero
        # As `planish::quantize` has it: a division would round some ties the other way.
        inverse = 1 / torch.tensor(scale, dtype=torch.float32)
        return torch.mul(x, inverse).round_().clamp_(-zero, INPUT_LEVELS - zero)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # What rounds to the first or last step is not clipped.
        low, high = (-ctx.zero - 0.5) * ctx.scale, (INPUT_LEVELS - ctx.zero + 0.5) * ctx.scale
        passed: Tensor = torch.ops.aten.hardtanh_backward(gradients[0], x, low, high)
        return passed.div_(ctx.scale), None, None


class _StepsOfTensors(torch.autograd.Function):
    """`_Steps` of a scale and a zero point that stay where they are: nothing waits for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        return torch.mul(x, 1 / scale).round_().clamp_(-zero, INPUT_LEVELS - zero)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale, zero = ctx.saved_tensors
        inside = (x > (-zero - 0.5) * scale) & (x < (INPUT_LEVELS - zero + 0.5) * scale)
        return gradients[0] * inside / scale, None, None


def _in_memory_order(x: Tensor) -> Tensor:
    """The same values without a copy, which `aminmax` makes of what has its channels last."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 and not x.is_contiguous() else x


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    if x.device.type != "cpu":
        moved: Tensor = _StepsOfTensors.apply(x, scale.detach(), zero_point.detach())  # type: ignore[no-untyped-call]
        return moved
    result: Tensor = _Steps.apply(x, float(scale), int(zero_point))  # type: ignore[no-untyped-call]
    return result


def _axis(layer: nn.Module) -> int:
    """The axis of a layer's weights along which neighbours are limited together."""
    single = isinstance(layer, nn.Conv2d) and layer.in_channels == 1
    return 3 if single else 1


def _sums_of_pairs(weight: Tensor, axis: int) -> Tensor:
    """For every weight (o, i, ...) the sum of magnitudes of the two that are limited together, itself and another."""
    sizes = weight.abs().movedim(axis, -1)
    sums = sizes.clone()
    whole = sizes.shape[-1] // 2 * 2
    sums[..., 0:whole:2] += sizes[..., 1:whole:2]
    sums[..., 1:whole:2] += sizes[..., 0:whole:2]
    return sums.movedim(-1, axis)


def _peak(weight: Tensor, bits: int, axis: int) -> Tensor:
    """The largest magnitude of every output channel, or for 8 bits the largest sum of two, (o,)."""
    return (_sums_of_pairs(weight, axis) if bits == 8 else weight.abs()).flatten(1).amax(1)


def _whole(steps: Tensor, bits: int, axis: int) -> Tensor:
    """Weights in steps of their scale as whole numbers that keep to `LEVELS` and `PAIRS`."""
    levels = LEVELS[bits]
    if bits == 8:
        return round_through(steps * (levels / _sums_of_pairs(steps.detach(), axis)).clamp_max(1.0))
    # Rounded first: the largest weight lies at the limit, and one that is cut off there would learn no more.
    return torch.clamp(round_through(steps), -levels, levels)


def _best_clip(weight: Tensor, bits: int, axis: int) -> Tensor:
    """For every output channel the part of its peak that gives the least squared error, (o,)."""
    peak = _peak(weight, bits, axis).clamp_min(1e-12)
    errors = []
    for clip in CLIPS:
        scale = column(peak * clip / LEVELS[bits], weight)
        errors.append((_whole(weight / scale, bits, axis) * scale - weight).square().flatten(1).sum(1))
    return CLIPS[torch.stack(errors).argmin(0)].clone()


def _best_shrink(values: Tensor, low: float, high: float) -> float:
    errors = []
    for clip in CLIPS:
        scale = max((high - low) * float(clip) / INPUT_LEVELS, 1e-12)
        zero_point = round(-low * float(clip) / scale)
        steps = torch.clamp(torch.round(values / scale) + zero_point, 0, INPUT_LEVELS) - zero_point
        errors.append(float((steps * scale - values).square().mean()))
    return float(CLIPS[errors.index(min(errors))])


def _inside_quantized(module: nn.Module, name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    whole = Quantized | WeightQuantized | IntegerConv2d | IntegerLinear | WeightOnlyLinear
    return isinstance(module.get_submodule(parent), whole | Bfloat16 | Bfloat16Conv2d | Bfloat16Linear)
