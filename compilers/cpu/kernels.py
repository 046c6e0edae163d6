"""The convolution kernel of a choice, and its weights in the order in which it reads them."""

from __future__ import annotations

from typing import Any

import tvm
from numpy.typing import NDArray

from .convspec import ConvSpec
from .depthwise import depthwise
from .direct import convolution
from .machine import Machine
from .packing import weight_depthwise, weight_float, weight_int8
from .tiles import Choice, WinogradTile
from .winograd import winograd, winograd_weight


def conv_kernel(spec: ConvSpec, choice: Choice, machine: Machine) -> tvm.tirx.PrimFunc:
    """The function of (data, [1 / scale and zero point], weights of `conv_weights`, one buffer a step, output).

    The second argument is there for int8.
    """
    if isinstance(choice, WinogradTile):
        return winograd(spec, choice, machine.pairs)
    return depthwise(spec, choice.ow) if spec.depthwise else convolution(spec, choice)


def conv_weights(
    spec: ConvSpec, choice: Choice, machine: Machine, weight: NDArray[Any], zero_point: int = 0
) -> list[NDArray[Any]]:
    """The weights (o, c/groups, kh, kw), float32 or int8, as the kernel takes them; the zero point is the data's."""
    if isinstance(choice, WinogradTile):
        return [winograd_weight(spec, weight, choice.m, machine.pairs)]
    if spec.depthwise:
        return [weight_depthwise(weight, spec.lanes)]
    return weight_int8(spec, weight, zero_point) if spec.int8 else [weight_float(spec, weight)]
