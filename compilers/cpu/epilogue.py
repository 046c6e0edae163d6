"""What a kernel does with a sum before it stores it: bias, shortcut, activation, quantisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te
from tvm.tirx.script import builder as T

from . import functions
from .convspec import BUFFER_STEPS, EXPONENTIAL_STEPS, ConvSpec, Step
from .functions import const
from .narrow import TOGETHER, bytes_of, narrows


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
            value = quantized(value if step.values else value * numbers[0], numbers[1])
        elif step.op == "bfloat16":
            value = functions.bfloat16(value)
        else:
            value = activation(step, value)
    return value


def stores_bytes(spec: ConvSpec) -> bool:
    """Whether the CPU stores several vectors of the result as bytes at once (see `store_bytes`)."""
    last = bool(spec.steps) and spec.steps[-1].op == "quantize"
    return last and narrows(spec.dot, spec.lanes) and not any(step.op in EXPONENTIAL_STEPS for step in spec.steps)


def store_bytes(
    steps: Sequence[Step],
    buffers: Sequence[Any],
    out: Any,
    values: Sequence[Any],
    channel: tuple[Any, ...],
    places: Sequence[tuple[Any, ...]],
    lanes: int,
) -> None:
    """Stores what all steps, of which the last quantises, make of the vectors of neighbouring pixels.

    Args:
        steps: See `finish`; no exponentials.
        buffers: See `finish`.
        out: The result, its last two axes, pixels and lanes, joined.
        values: `TOGETHER` vectors of float32.
        channel: As `finish` takes it; the last index is a ramp.
        places: Of each vector, likewise.
        lanes: Of each vector.
    """
    factor, zero_point = buffers[-1][0], buffers[-1][1]
    found = [finish(steps[:-1], buffers, value, channel, place) for value, place in zip(values, places, strict=True)]
    *row, pixel, _ = places[0]
    divided = found if steps[-1].values else [value * factor for value in found]
    stored = bytes_of(divided, zero_point, lanes)
    T.buffer_store(out, stored, [*row, T.ramp(pixel * lanes, 1, TOGETHER * lanes)])


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


def quantized(value: Any, zero_point: Any) -> Any:
    """clamp(round(value) + zero point, 0, 255) as uint8; halves are rounded to even (see `spaces.integer`).

    Both are float32, the value in multiples of the scale. The result is narrowed from int32: LLVM does that to a whole
    vector in one instruction.
    """
    return (quantized_steps(value, zero_point) + zero_point.astype("int32")).astype("uint8")


def quantized_steps(value: Any, zero_point: Any) -> Any:
    """The same less the zero point, as int32.

    The clamp comes first: its bounds are whole numbers, so that rounding does not cross them.
    """
    bounded = te.min(te.max(value, const(0) - zero_point), const(255) - zero_point)
    return functions.whole(bounded)
