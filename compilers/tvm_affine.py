"""Factors and offsets a channel that follow a layer, joined into one of each."""

from __future__ import annotations

import numpy as np

from .tvm_graph import Array, ChainStep


def leading_affine(steps: list[ChainStep], channels: int) -> tuple[tuple[Array, Array], list[ChainStep]]:
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
