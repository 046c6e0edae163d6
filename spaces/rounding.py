"""Rounding that gradients pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Through(torch.autograd.Function):
    """Rounds; the gradient passes as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """rounding(x); gradients pass unchanged (straight-through, Bengio et al. 2013)."""
    result: Tensor = _Through.apply(x, rounding)  # type: ignore[no-untyped-call]
    return result


def round_through(x: Tensor) -> Tensor:
    """The nearest whole numbers, halves to even; gradients as in `through`."""
    return through(x, torch.round)


def column(scale: Tensor, weight: Tensor) -> Tensor:
    """A value for each output channel, (o,), in a shape that multiplies a weight (o, ...)."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1))
