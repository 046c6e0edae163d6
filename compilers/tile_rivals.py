"""The ways to compute a program's convolutions that are near the one it takes, as kernels that can be timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from ..hwmodels.device import Device
from .cpu.convspec import ConvSpec
from .cpu.kernels import conv_arguments, conv_kernel
from .cpu.machine import Machine
from .cpu.tiles import Choice, WinogradTile, choices
from .tvm_build import cpu_machine, fused
from .tvm_lower_conv import conv_name
from .tvm_values import named_kernel
from .tvm_workloads import KernelWork, workload_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# Beside the choice itself, the next ones by estimate.
_RIVALS = 4
_BYTES = {"float32": 4, "int32": 4, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Contest:
    """A convolution by its `repr`, and its rivals by theirs, with their kernels; what is taken unmeasured is first."""

    convolution: str
    works: dict[str, KernelWork]


def contests(program: ExportedProgram, device: Device) -> Iterator[Contest]:
    """The convolutions of a program that have not been measured, each with the ways to compute it that are near.

    Rivals read as many weights as the choice does (a direct form is none of Winograd's): timed alone a kernel finds its
    weights in the caches, and in a model it may not.

    Raises:
        CompileError: the program cannot be compiled for the device.
    """
    machine = cpu_machine(device)
    found = fused(program, device)
    for spec, (taken, bound) in found.convolutions.items():
        if spec.depthwise or repr(spec) in device.tiles:
            continue
        near = [tile for tile in choices(spec, machine, 0, bound) if _form(tile) == _form(taken) and tile != taken]
        works = {repr(tile): _work(spec, tile, machine, found.context) for tile in [taken, *near[:_RIVALS]]}
        yield Contest(repr(spec), works)


def _form(tile: Choice) -> int:
    return tile.m if isinstance(tile, WinogradTile) else 0


def _work(spec: ConvSpec, tile: Choice, machine: Machine, context: object) -> KernelWork:
    if spec.int8 and isinstance(tile, WinogradTile):  # as in lower_convolution
        spec = replace(spec, dot=machine.dot)
    # As the lowering names it, so that a model finds in the store what was compiled here.
    made = partial(conv_kernel, spec, tile, machine)
    kernel = named_kernel(conv_name(spec, tile), (spec, tile), (spec, tile), context, made)
    arguments = conv_arguments(spec, tile, machine)
    sizes = [prod(shape) * _BYTES[kind] for shape, kind in arguments]
    weights = sizes[2 if spec.int8 else 1]
    return KernelWork(workload_of(kernel.subject, machine, sum(sizes), weights), kernel, tuple(arguments))
