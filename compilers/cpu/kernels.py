"""The convolution kernel of a choice, and its weights in the order in which it reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from .convspec import ConvSpec, data_type, weight_type
from .depthwise import depthwise
from .depthwise_bytes import depthwise_bytes
from .direct import convolution
from .epilogue import epilogue_buffers
from .machine import Machine
from .packing import weight_depthwise, weight_dot, weight_float, weight_neighbours
from .tiles import Choice, WinogradTile
from .winograd import winograd, winograd_weight


def conv_kernel(spec: ConvSpec, choice: Choice, machine: Machine) -> tvm.tirx.PrimFunc:
    """The function of (data, [1 / scale and zero point], weights of `conv_weights`, one buffer a step, output).

    The second argument is there for int8.
    """
    if isinstance(choice, WinogradTile):
        return winograd(spec, choice, machine.pairs)
    if spec.neighbours:
        return depthwise_bytes(spec)
    return depthwise(spec, choice.ow) if spec.depthwise else convolution(spec, choice)


def conv_arguments(spec: ConvSpec, choice: Choice, machine: Machine) -> list[tuple[tuple[int, ...], str]]:
    """Shape and type of every argument of `conv_kernel`, the output last."""
    plain = spec.in_lanes != spec.lanes
    data = (spec.n, spec.c, spec.h, spec.w) if plain else (spec.n, spec.in_blocks, spec.h, spec.w, spec.lanes)
    out = (spec.n, spec.out_blocks, spec.oh, spec.ow, spec.lanes)
    weight = np.zeros((spec.o, 1 if spec.depthwise else spec.c // spec.groups, *spec.kernel), np.int8)
    packed = conv_weights(spec, choice, machine, weight.astype(weight_type(spec.dot)))
    extra = epilogue_buffers(spec.steps, (spec.out_blocks, spec.lanes), out)
    return [
        (data, data_type(spec.dot, spec.quantize)),
        *([((2,), "float32")] if spec.int8 else []),
        *((array.shape, str(array.dtype)) for array in packed),
        *((shape, "float32") for _, shape in extra),
        (out, spec.out_dtype),
    ]


def conv_weights(
    spec: ConvSpec, choice: Choice, machine: Machine, weight: NDArray[Any], zero_point: int = 0
) -> list[NDArray[Any]]:
    """The weights (o, c/groups, kh, kw) as the kernel takes them; the zero point is that of int8's data.

    They are float32, int8, or uint16 as `packing.bfloat16` gives them.
    """
    if isinstance(choice, WinogradTile):
        return [winograd_weight(spec, weight, choice.m, machine.pairs)]
    if spec.neighbours:
        return weight_neighbours(spec, weight, zero_point)
    if spec.depthwise:
        return [weight_depthwise(weight, spec.lanes)]
    return weight_dot(spec, weight, zero_point) if spec.dot else [weight_float(spec, weight)]
