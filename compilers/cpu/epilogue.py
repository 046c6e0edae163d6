"""What a kernel does with a sum before it stores it: bias, shortcut, activation, quantisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te

from . import functions
from .convspec import BUFFER_STEPS, Step
from .functions import const


def epilogue_buffers(
    steps: Sequence[Step], lanes_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the buffer of each step that needs one."""
    return [
        (f"{step.op}{number}", {"scale": lanes_shape, "bias": lanes_shape, "quantize": (2,)}.get(step.op, out_shape))
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
        elif step.op == "quantize":
            numbers = next(remaining)
            value = quantized(value, numbers[0], numbers[1])
        elif step.op == "bfloat16":
            value = functions.bfloat16(value)
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
    if step.op not in _FUNCTIONS:
        raise ValueError(f"step {step.op!r} is not known to the CPU kernels")
    return _FUNCTIONS[step.op](value)


def quantize_numbers(scale: float, zero_point: int) -> NDArray[np.float32]:
    """1 / scale and zero point, as the kernels read them."""
    return np.array([np.float32(1) / np.float32(scale), zero_point], np.float32)


def quantized(value: Any, factor: Any, zero_point: Any) -> Any:
    """clamp(round(value * factor) + zero point, 0, 255) as uint8; halves are rounded to even (see `spaces.integer`).

    All are float32. The result is narrowed from int32: LLVM does that to a whole vector in one instruction.
    """
    return (quantized_steps(value, factor, zero_point) + zero_point.astype("int32")).astype("uint8")


def quantized_steps(value: Any, factor: Any, zero_point: Any) -> Any:
    """The same less the zero point, as int32.

    The clamp comes first: its bounds are whole numbers, so that rounding does not cross them.
    """
    bounded = te.min(te.max(value * factor, const(0) - zero_point), const(255) - zero_point)
    return functions.whole(bounded)
