"""Writes a compiled model's folder, the same for every compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..hwmodels.device import Device
from .compiler import Artifact, CompileError, Compiler
from .cpu_features import described_instructions, instruction_set
from .manifest import EXAMPLES, Manifest, Port, digest
from .verify import store_examples

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Built:
    """What is known of a library once it is built.

    `working_bytes` is the peak of its intermediate values, `kernels` (kernel, site) of every call in order.
    """

    working_bytes: int = 0
    kernels: tuple[tuple[str, str], ...] = ()


def write_artifact(
    compiler: Compiler,
    library: str,
    build: Callable[[Path], Built],
    program: ExportedProgram,
    device: Device,
    folder: Path,
    examples: torch.Tensor,
    tolerance: float,
    versions: Mapping[str, str],
) -> Artifact:
    """Builds the library, stores the examples and writes the manifest last.

    A folder without a manifest is therefore one whose compilation did not end.

    Raises:
        CompileError: the compiler cannot serve the device, the folder is not empty, or the program
            has not one input and one output of fixed shape.
    """
    lacking = compiler.missing(device)
    if lacking:
        raise CompileError(f"device {device.name} is not usable here: {lacking}")
    if folder.exists() and any(folder.iterdir()):
        raise CompileError(f"{folder} is not empty; name a new folder")
    inputs, outputs = (_port(program, "input"),), (_port(program, "output"),)
    folder.mkdir(parents=True, exist_ok=True)
    built = build(folder / library)
    store_examples(program, examples, folder)
    manifest = Manifest(
        compiler=compiler.name,
        library=library,
        device=device.name,
        target={**device.target, **_instructions(device)},
        threads=device.threads,
        inputs=inputs,
        outputs=outputs,
        tolerance=tolerance,
        files={name: digest(folder / name) for name in (library, EXAMPLES)},
        working_bytes=built.working_bytes,
        kernels=built.kernels,
        versions=versions,
    )
    manifest.write(folder)
    return Artifact(folder, manifest)


def _instructions(device: Device) -> Mapping[str, str]:
    """What the code may hold: all that this machine has where it is compiled for that, else what is described."""
    own = (device.here and not device.rpc) or device.target.get("mcpu") == "host"
    return device.instructions or (instruction_set() if own else described_instructions(device))


def _port(program: ExportedProgram, label: str) -> Port:
    import torch
    from torch.export.graph_signature import InputKind, OutputKind

    signature = program.graph_signature
    specs = signature.input_specs if label == "input" else signature.output_specs
    names = [spec.arg.name for spec in specs if spec.kind in (InputKind.USER_INPUT, OutputKind.USER_OUTPUT)]
    if len(names) != 1:
        raise CompileError(f"the model has {len(names)} {label}s; compilers take models of one input and one output")
    value = {node.name: node for node in program.graph.nodes}[names[0]].meta["val"]
    if not isinstance(value, torch.Tensor):
        raise CompileError(f"the model's {label} is a {type(value).__name__}; compilers take models of tensors")
    if not all(isinstance(size, int) for size in value.shape):
        raise CompileError(f"the model's {label} has the shape {tuple(value.shape)}; export it with fixed shapes")
    return Port(label, tuple(value.shape), str(value.dtype).removeprefix("torch."))
