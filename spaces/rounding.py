"""Rounding that gradients pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Round(torch.autograd.Function):
    """Rounds half to even; the gradient passes as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_through(x: Tensor) -> Tensor:
    """The nearest whole numbers, halves to even; gradients pass unchanged (straight-through, Bengio et al. 2013)."""
    result: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return result


def column(scale: Tensor, weight: Tensor) -> Tensor:
    """A value for each output channel, (o,), in a shape that multiplies a weight (o, ...)."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1))
