"""What follows a layer, joined: factors and offsets a channel, and the bounds that bytes have anyway."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .cpu.convspec import DIVIDED
from .tvm_graph import Array, ChainStep

# Factor and offset a channel.
Affine = tuple[Array, Array]


def leading_affine(steps: list[ChainStep], channels: int) -> tuple[Affine, list[ChainStep]]:
    """Factor and offset a channel of the affine steps at the start, and the steps that are left."""
    scale, bias = np.ones(channels), np.zeros(channels)
    for position, step in enumerate(steps):
        if step.array is None or step.step.op == "quantize":
            return (scale, bias), steps[position:]
        if step.step.op == "scale":
            scale, bias = scale * step.array, bias * step.array
        else:
            bias = bias + step.array
    return (scale, bias), []


def divided_by_scale(affine: Affine, rest: list[ChainStep]) -> tuple[Affine, list[ChainStep]]:
    """The same where nothing but a ReLU stands before the last step, which quantises: the scale joins the affine."""
    between, last = rest[:-1], rest[-1] if rest else None
    if last is None or last.array is None or last.step.op != "quantize" or any(s.step.op != "relu" for s in between):
        return affine, rest
    factor = float(last.array[0])
    return (affine[0] * factor, affine[1] * factor), [*between, replace(last, step=DIVIDED)]


def within_bytes(rest: list[ChainStep]) -> list[ChainStep]:
    """The steps less a ReLU or clip before the last one where bytes have no room for what it cuts off."""
    while len(rest) > 1 and rest[-1].step.op == "quantize" and _holds(rest[-2], rest[-1].array):
        rest = [*rest[:-2], rest[-1]]
    return rest


def _holds(step: ChainStep, numbers: Array | None) -> bool:
    """Whether what the step cuts off is what the bytes cut off, or rounds to their ends."""
    if numbers is None or step.step.op not in ("relu", "clip"):
        return False
    factor, zero_point = np.float32(numbers[0]), float(numbers[1])
    low, high = step.step.values or (0.0, np.inf)
    ends = [float(np.rint(np.float32(bound) * factor)) + zero_point for bound in (low, high)]
    return ends[0] <= 0 and ends[1] >= 255
