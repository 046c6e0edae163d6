"""Relax to a library on disk."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import relax

from ..hwmodels.device import Device
from .artifact import Built
from .compiler import CompileError
from .cores import cores
from .cpu.convspec import ConvSpec
from .cpu.fallback import schedule_rest
from .cpu.machine import Machine, usable_dots
from .cpu.tiles import Choice
from .kernel_store import KernelStore
from .linker import linker
from .tvm_batch import split
from .tvm_frontend import import_program
from .tvm_graph import Graph
from .tvm_lower import lower, lower_split
from .tvm_values import Kernel

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def build_library(program: ExportedProgram, device: Device, library: Path, store: KernelStore | None = None) -> Built:
    """Compiles a program to a shared library.

    Args:
        program: Of static shapes.
        device: What it runs on.
        library: The file that is written.
        store: Where kernels are kept; by default the user's.

    Raises:
        CompileError: an operation, a shape, the target or the linker does not permit it.
    """
    found = fused(program, device)
    with _told(device), found.target, tempfile.TemporaryDirectory() as folder:
        objects = kernel_objects(found.kernels, found.target, Path(folder), store or KernelStore())
        module = finished(found.module)
        executable = tvm.compile(module, found.target, relax_pipeline=None)
        compiler = linker(device) or "c++"
        linux = sys.platform == "linux"
        executable.mod.export_library(
            str(library),
            addons=[str(file) for file in objects],
            fpack_imports=partial(pack_constants, compiler) if linux else None,
            cc=compiler,
            # The identity that Linux's linkers add is a digest of the whole file, which takes longer than all the rest.
            **({"options": ["-Wl,--build-id=none"]} if linux else {}),
        )
    return Built(planned_bytes(module), tuple(found.calls))


@dataclass(frozen=True)
class Fused:
    """A program as calls of kernels: `main` in order, what has no kernel of ours fused and scheduled beside it.

    Attributes:
        kernels: Ours that are called; `calls` (symbol, site) of every call of one, in order.
        context: What beside a kernel's own key decides about its code.
        convolutions: As in `Lowered`.
    """

    module: tvm.IRModule
    kernels: list[Kernel]
    calls: list[tuple[str, str]]
    target: Any
    context: object
    convolutions: dict[ConvSpec, tuple[Choice, int]]


def fused(program: ExportedProgram, device: Device) -> Fused:
    """Lowers a program of static shapes for a device; nothing is compiled yet.

    Raises:
        CompileError: an operation, a shape or the target does not permit it.
    """
    target = tvm_target(device)
    cpu = cpu_machine(device)
    context = (str(target), cpu, version("apache-tvm"))
    with _told(device), target:
        imported = import_program(program)
        graph = Graph(imported)
        found = split(imported, graph, cpu)
        lowered = lower_split(found, cpu, context) if found else lower(graph, cpu, context)
        module = lowered.module
        with tvm.transform.PassContext(config={"relax.FuseOps.max_depth": _FUSED_OPS}):
            for step in _FUSION:
                module = step(module)
        module = relax.transform.RewriteDataflowReshape()(schedule_rest(module, cpu.lanes, cpu.threads))
    return Fused(module, lowered.kernels, lowered.calls, target, context, lowered.convolutions)


def finished(module: tvm.IRModule) -> tvm.IRModule:
    """A fused module with its memory planned, ready for the virtual machine."""
    for step in _FINISH:
        module = step(module)
    return module


@contextmanager
def _told(device: Device) -> Iterator[None]:
    """Words whatever goes wrong as a CompileError."""
    try:
        yield
    except CompileError:
        raise
    except Exception as error:
        # TVM raises a dozen kinds of errors from C++; for a candidate they all mean that it cannot be compiled.
        # A failed linker ends with its command line, after what it had to say.
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Command line:")]
        raise CompileError(
            f"TVM cannot compile the model for {device.name}: {lines[-1] if lines else type(error).__name__}"
        ) from error


def kernel_objects(
    kernels: Sequence[Kernel],
    target: Any,
    folder: Path,
    store: KernelStore,
    failed: Callable[[Kernel, Exception], None] | None = None,
) -> list[Path]:
    """The object files of kernels, from the store or compiled now, on all the cores that are allowed, and stored.

    Args:
        kernels: Each with a symbol of its own.
        target: TVM's.
        folder: Where the files go.
        store: Of object code.
        failed: Told of a kernel that cannot be compiled, which has no file then; by default that is raised.
    """
    missing: list[Kernel] = []
    old: list[str] = []
    for kernel in kernels:
        code = store.get(kernel.key)
        if code is None:
            missing.append(kernel)
        else:
            _object_file(folder, kernel).write_bytes(code)
            old.append(kernel.key)
    found: dict[str, bytes | Exception] = {}
    # TVM releases Python's lock while it compiles, and what several threads write is what one does.
    with ThreadPoolExecutor(cores()) as threads:
        compiled = threads.map(lambda kernel: _compiled(kernel, target, _object_file(folder, kernel)), missing)
        found.update(zip((kernel.key for kernel in missing), compiled, strict=True))
    store.put({key: code for key, code in found.items() if isinstance(code, bytes)})
    store.touch(old)
    for kernel in missing:
        error = found[kernel.key]
        if isinstance(error, Exception):
            if failed is None:
                raise error
            failed(kernel, error)
    lost = {kernel.key for kernel in missing if isinstance(found[kernel.key], Exception)}
    return [_object_file(folder, kernel) for kernel in kernels if kernel.key not in lost]


def _object_file(folder: Path, kernel: Kernel) -> Path:
    return folder / f"{kernel.symbol}.o"


def _compiled(kernel: Kernel, target: Any, file: Path) -> bytes | Exception:
    try:
        with target:  # of this thread
            function = kernel.build().with_attr("global_symbol", kernel.symbol)
            tvm.compile(tvm.IRModule({kernel.symbol: function}), target).mod.write_to_file(str(file))
        return file.read_bytes()
    except Exception as error:
        return error


def pack_constants(compiler: str, module: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
    """The bytecode and constants of a module as an object file, for `export_library`; returns its path.

    TVM's own way makes one LLVM constant of them, which takes ResNet-50 two seconds; an assembler only copies them.
    """
    data = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy()
    source, file = (Path(folder, f"constants.{suffix}") for suffix in ("s", "o"))
    symbol = prefix + tvm_ffi.get_global_func("runtime.ModuleImportsBlobName")()
    # A file in memory: there are many megabytes, which the disk gets twice anyway.
    with open(os.memfd_create("constants"), "wb") as binary:
        binary.write(data)
        binary.flush()
        source.write_text(
            f".section .rodata\n.globl {symbol}\n.type {symbol}, %object\n.p2align 6\n{symbol}:\n"
            f'.incbin "/proc/{os.getpid()}/fd/{binary.fileno()}"\n.size {symbol}, . - {symbol}\n'
            '.section .note.GNU-stack,"",%progbits\n',
            encoding="utf-8",
        )
        subprocess.run([compiler, "-c", str(source), "-o", str(file)], check=True, capture_output=True, text=True)
    return str(file)


def tvm_target(device: Device) -> Any:
    """TVM's target of a CPU.

    Raises:
        CompileError: this TVM does not know the target.
    """
    settings: dict[str, Any] = dict(device.target)
    if settings.get("mcpu") == "host":
        settings["mcpu"] = tvm.target.codegen.llvm_get_system_cpu()
    settings["num-cores"] = device.threads
    try:
        return tvm.target.Target(settings)
    except Exception as error:
        raise CompileError(f"TVM does not know the target {dict(device.target)} of {device.name}: {error}") from error


def cpu_machine(device: Device) -> Machine:
    """What the kernels need to know of a CPU, by the device's features."""
    return replace(_cpu_machine(device), tiles=device.tiles)


def _cpu_machine(device: Device) -> Machine:
    features, lanes = device.features, device.lanes
    dot = usable_dots(features, lanes)[0]
    if "avx512f" in features:
        return Machine(lanes, 32, dot, device.threads, bfloat16="avx512_bf16" in features)
    if "asimd" in features:
        return Machine(lanes, 32, dot, device.threads, fmas=2, latency=4)
    if "avx2" in features:
        # These caches and cycles a line are those of the AVX2 machine that was measured (Zen 3).
        caches, lines = (32 << 10, 512 << 10, 12 << 20), (1.0, 2.0, 15.0)
        return Machine(lanes, 16, dot, device.threads, fmas=2, latency=4, caches=caches, line_cycles=lines)
    return Machine(lanes, 16, dot, device.threads)


def planned_bytes(module: tvm.IRModule) -> int:
    """The storage that a module's functions allocate once and reuse: the peak of the intermediate values."""
    total = 0

    def visit(expr: Any) -> None:
        nonlocal total
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.vm.alloc_storage":
            total += math.prod(int(dim) for dim in expr.args[0].values)

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return total


# Operators in one kernel, at most. What a residual sum reads twice is written twice when its stages become one
# expression: of every further block of a chain without convolutions in it the expression is twice as long.
_FUSED_OPS = 24
_FUSION = (
    relax.transform.LegalizeOps(),
    relax.transform.AnnotateTIROpPattern(),
    relax.transform.FuseOps(),
    relax.transform.FuseTIR(),
    relax.transform.DeadCodeElimination(),
)
_FINISH = (
    relax.transform.ToNonDataflow(),
    relax.transform.RemovePurityChecking(),
    relax.transform.CallTIRRewrite(),
    relax.transform.StaticPlanBlockMemory(),
    relax.transform.LowerAllocTensor(),
    relax.transform.KillAfterLastUse(),
    relax.transform.LowerRuntimeBuiltin(),
    relax.transform.ComputePrimValue(),
    relax.transform.VMShapeLower(),
    relax.transform.AttachGlobalSymbol(),
)
