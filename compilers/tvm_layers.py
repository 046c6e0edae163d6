"""The kernels that single layers of given shapes will call on a CPU, known without a program: milliseconds for a space.

What stands around a layer decides its epilogue; here every layer is followed by a bias and a ReLU, and one of bytes
or bfloat16 reads and writes those. Moves between float32 and them, or of layouts, are left out: a whole program's plan
(`tvm_workloads.plan`) has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import ceil, prod

from ..hwmodels.device import Device
from ..hwmodels.workload import Workload
from ..spaces.bit_widths import LEVELS, PAIRS
from ..spaces.layer_shapes import LayerShape
from .cpu.convspec import DIVIDED, ConvSpec, Step
from .cpu.dense import DenseSpec, nibbles_pay
from .cpu.machine import Dot, Machine
from .cpu.tiles import PARALLEL_MACS, Choice, WinogradTile, chosen, plain_form, plain_lanes
from .tvm_build import cpu_machine
from .tvm_workloads import workload_of

_FLOAT = (Step("bias"), Step("relu"))
# The largest sum of a convolution of bytes, for each of its weights: which of Winograd's forms are exact hangs on it.
# Weights of trained layers have a mean magnitude of about a quarter of the largest, half of them on each side of zero.
_USUAL_SUM = 6000
# Of bytes that follow a ReLU the least is its zero.
_BYTES = (Step("scale"), Step("bias"), DIVIDED)
_STEPS = {8: _BYTES, 16: (*_FLOAT, Step("bfloat16")), 32: _FLOAT}


def layer_workloads(device: Device) -> Callable[[Sequence[LayerShape]], list[Workload]]:
    """A function from layers to the kernels that compute them on a CPU; equal layers are looked at once."""
    machine = cpu_machine(device)

    @cache
    def one(layer: LayerShape) -> Workload:
        return _dense(layer, machine) if layer.op == "linear" else _convolution(layer, machine)

    return lambda layers: [one(replace(layer, entries=0)) for layer in layers]


def _dot(layer: LayerShape, machine: Machine) -> Dot | None:
    if layer.bits == 16:
        return machine.halves
    return machine.dot_for(PAIRS[layer.stored_bits]) if layer.bits == 8 else None


def _dense(layer: LayerShape, machine: Machine) -> Workload:
    rows, dot = prod(layer.writes), _dot(layer, machine)
    steps = (Step("scale"), Step("bias")) if layer.bits == 8 else (Step("bias"),)
    threads = machine.threads if layer.macs >= PARALLEL_MACS else 1
    spec = DenseSpec(
        m=rows, k=layer.inputs, o=layer.outputs, lanes=machine.lanes, dot=dot, quantize=False, steps=steps,
        threads=threads,
    )  # fmt: skip
    size = layer.bits // 8
    weights = layer.weights * size
    if not dot and layer.stored_bits < 32:
        bits = 4 if layer.stored_bits == 4 and layer.inputs % 8 == 0 else 8
        steps = (Step("scale"), Step("bias"))
        spec, weights = replace(spec, weight_bits=bits, steps=steps), layer.weights * bits // 8
    if layer.bits == 8 and nibbles_pay(spec, LEVELS[layer.stored_bits], machine):
        spec, weights = replace(spec, nibbles=True), weights // 2
    moved = rows * (layer.inputs + layer.outputs) * size + weights
    return workload_of(spec, machine, moved, weights)


def _convolution(layer: LayerShape, machine: Machine) -> Workload:
    lanes = machine.lanes
    depthwise = layer.groups == layer.inputs == layer.outputs and layer.groups > 1
    groups = 1 if depthwise else _whole_groups(layer, lanes)
    plain = not depthwise and layer.inputs < lanes
    dot, in_lanes = _dot(layer, machine), 1 if plain else lanes
    if dot and dot.floats:
        in_lanes = plain_lanes(layer.inputs, layer.kernel, layer.dilation, dot, machine) if plain else lanes
    elif dot and plain:
        channels, columns = PAIRS[layer.stored_bits], 2 * LEVELS[layer.stored_bits]
        if layer.inputs == 1:  # whose columns are limited in pairs
            channels, columns = LEVELS[layer.stored_bits], channels
        dot, in_lanes = plain_form(layer.inputs, layer.kernel, layer.dilation, machine, channels, columns)
    elif dot and depthwise:
        dot = machine.dot
    top, left = layer.padding
    spec = ConvSpec(
        n=1, c=layer.inputs, h=layer.reads[0], w=layer.reads[1], o=layer.outputs, kernel=layer.kernel,
        stride=layer.stride, padding=(top, left, top, left), dilation=layer.dilation, groups=groups, lanes=lanes,
        in_lanes=in_lanes, depthwise=depthwise, dot=dot, steps=_STEPS[layer.bits],
    )  # fmt: skip
    bound = _USUAL_SUM * layer.inputs // groups * prod(layer.kernel) if layer.bits == 8 else 0
    spec, choice = chosen(spec, machine, largest_sum=bound)
    if dot and isinstance(choice, WinogradTile):
        spec = replace(spec, dot=machine.dot)
    size = layer.bits // 8
    weights = _constant_bytes(spec, choice)
    data = (ceil(layer.inputs / in_lanes) * in_lanes) * prod(layer.reads)
    written = spec.out_blocks * lanes * prod(layer.writes)
    return workload_of((spec, choice), machine, (data + written) * size + weights, weights)


def _constant_bytes(spec: ConvSpec, choice: Choice) -> int:
    """The weights as the kernel of a choice takes them, and what the epilogue has of every channel."""
    channels = spec.out_blocks * spec.lanes
    if isinstance(choice, WinogradTile):
        found = (choice.m + 2) ** 2 * channels * spec.group_blocks * spec.lanes * (2 if spec.int8 else 4)
    elif spec.neighbours and spec.dot:
        found = channels * spec.kernel[0] * ceil(spec.kernel[1] / spec.dot.depth) * spec.dot.depth
    elif spec.depthwise:
        found = 4 * channels * prod(spec.kernel)
    else:
        found = channels * spec.group_blocks * spec.reduce_lanes * prod(spec.taps) * spec.weight_bytes
    corrected = spec.corrected and not isinstance(choice, WinogradTile)
    return found + 4 * channels * (sum(step.op in ("scale", "bias") for step in spec.steps) + corrected)


def _whole_groups(layer: LayerShape, lanes: int) -> int:
    """The groups that are left once those without whole blocks of channels are joined."""
    groups = layer.groups
    inputs, outputs = layer.inputs, layer.outputs
    return next(
        (
            g
            for g in range(groups, 0, -1)
            if groups % g == 0 and (inputs // g) % lanes == 0 and (outputs // g) % lanes == 0
        ),
        1,
    )
