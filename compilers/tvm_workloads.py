"""What a compiled program will run, known without compiling it: every kernel call in order, and the planned memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax
from tvm.ir.expr import Constant

from ..hwmodels.device import Device
from ..hwmodels.workload import Workload
from .cpu.attention import AttentionSpec
from .cpu.convspec import ConvSpec
from .cpu.dense import DenseSpec
from .cpu.machine import Machine
from .cpu.pool import MeanSpec, PoolSpec
from .cpu.rows import RowSpec
from .cpu.tiles import Choice, WinogradTile, direct_cycles, winograd_cycles
from .tvm_build import cpu_machine, finished, fused, planned_bytes
from .tvm_values import Kernel, function_kernel

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# A vector instruction of a kernel that only moves and adds handles so many bytes, with its loads and stores.
_MOVED_A_CYCLE = 16


@dataclass(frozen=True)
class KernelWork:
    """One kernel that a program calls.

    Attributes:
        workload: What it computes, without a site: calls of one kernel share it.
        kernel: What writes its code.
        arguments: Shape and type of every argument, the output last.
    """

    workload: Workload
    kernel: Kernel
    arguments: tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Plan:
    """What a compiled program will run.

    Attributes:
        calls: The workload of every call in order, with its site.
        kernels: Every different kernel, by its workload's key.
        working_bytes: The peak of the intermediate values, as TVM plans them.
    """

    calls: tuple[Workload, ...]
    kernels: dict[str, KernelWork]
    working_bytes: int


def plan(program: ExportedProgram, device: Device) -> Plan:
    """What the compiled program will call.

    Raises:
        CompileError: the program cannot be compiled for the device.
    """
    found = fused(program, device)
    cpu = cpu_machine(device)
    ours = {kernel.symbol: kernel for kernel in found.kernels}
    sites = list(found.calls)
    calls: list[Workload] = []
    kernels: dict[str, KernelWork] = {}
    rest: dict[str, Kernel] = {}

    def visit(symbol: str, arguments: list[tuple[tuple[int, ...], str]], constant_bytes: int) -> None:
        if symbol in ours:
            kernel, site = ours[symbol], sites.pop(0)[1]
        else:
            if symbol not in rest:
                rest[symbol] = function_kernel(found.module[symbol], symbol, found.context)
            kernel, site = rest[symbol], ""
        moved = sum(_bytes(argument) for argument in arguments)
        work = workload_of(kernel.subject, cpu, moved, constant_bytes, len(arguments))
        calls.append(replace(work, site=site))
        kernels.setdefault(work.key(), KernelWork(work, kernel, tuple(arguments)))

    _calls(found.module, found.module["main"], visit)
    with found.target:
        working_bytes = planned_bytes(finished(found.module))
    return Plan(tuple(calls), kernels, working_bytes)


def _calls(module: Any, function: Any, visit: Callable[[str, list[tuple[tuple[int, ...], str]], int], None]) -> None:
    """Visits every kernel call of a fused function, in order."""
    for block in function.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.GlobalVar):
                _calls(module, module[call.op], visit)
                continue
            name = getattr(call.op, "name", "") if isinstance(call, relax.Call) else ""
            if name not in ("relax.call_tir", "relax.call_dps_packed"):
                continue
            symbol = str(call.args[0].global_symbol if name == "relax.call_dps_packed" else call.args[0].name_hint)
            fields = list(call.args[1].fields) if isinstance(call.args[1], relax.Tuple) else [call.args[1]]
            arguments = [_tensor(field.ty) for field in fields]
            constant = sum(_bytes(_tensor(f.ty)) for f in fields if isinstance(f, Constant))
            visit(symbol, [*arguments, *(_tensor(ty) for ty in _results(call.ty))], constant)


def _results(kind: Any) -> list[Any]:
    return list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]


def _tensor(kind: Any) -> tuple[tuple[int, ...], str]:
    return tuple(int(size) for size in kind.shape.values), str(kind.dtype)


def _bytes(argument: tuple[tuple[int, ...], str]) -> int:
    shape, dtype = argument
    return prod(shape) * int(tvm.DataType(dtype).itemsize)


def workload_of(subject: object, cpu: Machine, moved: int, constant: int, operands: int = 2) -> Workload:
    """The work of a kernel, by what it computes and how (`Kernel.subject`), without a site.

    Args:
        subject: Of the kernel.
        cpu: It runs on.
        moved: All bytes that it reads and writes once.
        constant: Those of them that are weights.
        operands: Its arguments, the output too: of a function that TVM fused, each but the first two is at least one
            step more for every element.
    """
    if isinstance(subject, tuple) and isinstance(subject[0], ConvSpec):
        return _convolution(subject[0], subject[1], cpu, moved, constant)
    if isinstance(subject, DenseSpec):
        shapes = {"m": subject.m, "k": subject.k, "o": subject.o}
        cycles = ceil(subject.o / cpu.lanes) * cpu.lanes * subject.m * subject.k / cpu.macs_per_cycle(subject.dot)
        if subject.weight_bits < 32:  # widened and converted, once for every row of a tile
            cycles *= 1 + 2 / min(subject.m, 4)
        bits = subject.bits
        return Workload(
            "", "linear", shapes, subject.macs, moved, bits, constant, subject.threads, repr(subject),
            max(cycles, moved / _MOVED_A_CYCLE),
        )  # fmt: skip
    macs, threads, op, shapes = 0, 1, "elementwise", {"bytes": moved}
    if isinstance(subject, AttentionSpec):
        op, macs, threads, shapes = "attention", subject.macs, subject.threads, _sizes(subject)
        # Its operands may lie in one value, which is an argument three times.
        moved = 4 * (sum(map(prod, subject.shapes)) + subject.n * subject.s * subject.heads * subject.dv)
    elif isinstance(subject, RowSpec | PoolSpec):
        op, threads = (subject.op, subject.threads) if isinstance(subject, RowSpec) else ("pool", subject.threads)
        shapes = _sizes(subject)
    elif isinstance(subject, MeanSpec):
        op, threads, shapes = "mean", subject.threads, _sizes(subject)
    text = repr(subject)
    form = text
    if isinstance(subject, tuple) and subject[0] == "function":
        # The text of a function that TVM wrote is long; its digest tells it apart as well.
        form = f"{subject[1]} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        shapes = shapes | {"operands": operands}
    # Of an input and an output of float32; two steps a cycle.
    steps = (operands - 2) * (moved - constant) / 8 / cpu.lanes
    cycles = max(moved / _MOVED_A_CYCLE, macs / cpu.macs_per_cycle(None), steps / 2)
    return Workload("", op, shapes, macs, moved, 32, constant, threads, form, cycles)


def _convolution(spec: ConvSpec, choice: Choice, cpu: Machine, moved: int, constant: int) -> Workload:
    shapes = {
        "n": spec.n, "c": spec.c, "h": spec.h, "w": spec.w, "o": spec.o, "kh": spec.kernel[0], "kw": spec.kernel[1],
        "stride": spec.stride[0], "groups": spec.groups, "oh": spec.oh, "ow": spec.ow,
    }  # fmt: skip
    own = replace(cpu, threads=spec.threads)
    winograd = isinstance(choice, WinogradTile)
    cycles = (
        winograd_cycles(spec, choice, own) if isinstance(choice, WinogradTile) else direct_cycles(spec, choice, own)
    )
    op = "depthwise_conv2d" if spec.depthwise else "winograd_conv2d" if winograd else "conv2d"
    return Workload(
        "", op, shapes, spec.macs, moved, spec.bits, constant, spec.threads, repr((spec, choice)),
        cycles,
    )  # fmt: skip


def _sizes(spec: Any) -> dict[str, int]:
    return {name: int(value) for name, value in asdict(spec).items() if isinstance(value, int)}
