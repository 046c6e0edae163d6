"""What a kernel does with a sum before it stores it: bias, shortcut, activation, quantisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import te

from . import functions
from .convspec import BUFFER_STEPS, Step
from .functions import const


def epilogue_buffers(
    steps: Sequence[Step], lanes_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the buffer of each step that needs one."""
    return [
        (f"{step.op}{number}", lanes_shape if step.op in ("scale", "bias") else out_shape)
        for number, step in enumerate(steps)
        if step.op in BUFFER_STEPS
    ]


def finish(
    steps: Sequence[Step], buffers: Sequence[Any], value: Any, channel: tuple[Any, ...], place: tuple[Any, ...]
) -> Any:
    """The value after all steps; `buffers` are those of `epilogue_buffers`, read at `channel` or `place`."""
    remaining = iter(buffers)
    for step in steps:
        if step.op == "scale":
            value = value * next(remaining)[channel]
        elif step.op == "bias":
            value = value + next(remaining)[channel]
        elif step.op == "add":
            value = value + next(remaining)[place]
        elif step.op == "mul":
            value = value * next(remaining)[place]
        else:
            value = activation(step, value)
    return value


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    name: getattr(functions, name)
    for name in ("sigmoid", "silu", "tanh", "gelu", "hardsigmoid", "hardswish", "exp", "erf")
}


def activation(step: Step, value: Any) -> Any:
    """The elementwise steps that need no buffer."""
    if step.op == "relu":
        return te.max(value, const(0))
    if step.op == "clip":
        return te.min(te.max(value, const(step.values[0])), const(step.values[1]))
    if step.op == "quantize":
        return quantized(value, step.values[0], int(step.values[1]))
    if step.op not in _FUNCTIONS:
        raise ValueError(f"step {step.op!r} is not known to the CPU kernels")
    return _FUNCTIONS[step.op](value)


def quantized(value: Any, scale: float, zero_point: int) -> Any:
    """clamp(round(value * (1 / scale)) + zero point, 0, 255) as uint8; rounds half to even (see `spaces.integer`)."""
    # Through int32: LLVM narrows a whole vector of int32 in one instruction.
    return quantized_steps(value, scale, zero_point, 0).astype("uint8")


def quantized_steps(value: Any, scale: float, zero_point: int, offset: int) -> Any:
    """The same less `offset`, as int32.

    The clamp comes first: its bounds are whole numbers, so that rounding does not cross them.
    """
    factor = float(np.float32(1) / np.float32(scale))
    bounded = te.min(te.max(value * const(factor), const(-zero_point)), const(255 - zero_point))
    return functions.whole(bounded) + tvm.tirx.const(zero_point - offset, "int32")
