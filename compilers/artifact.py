"""Writes a compiled model's folder, the same for every compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..hwmodels.device import Device
from .compiler import Artifact, CompileError
from .manifest import EXAMPLES, Manifest, Port, digest
from .verify import store_examples

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


def write_artifact(
    compiler: str,
    library: str,
    build: Callable[[Path], int],
    program: ExportedProgram,
    device: Device,
    folder: Path,
    examples: torch.Tensor,
    tolerance: float,
    versions: Mapping[str, str],
) -> Artifact:
    """Builds the library (`build` returns its working bytes), stores the examples and writes the manifest last.

    A folder without a manifest is therefore one whose compilation did not end.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CompileError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    working_bytes = build(folder / library)
    store_examples(program, examples, folder)
    manifest = Manifest(
        compiler=compiler,
        library=library,
        device=device.name,
        target=device.target,
        threads=device.threads,
        inputs=_ports(program, "placeholder"),
        outputs=_ports(program, "output"),
        tolerance=tolerance,
        files={name: digest(folder / name) for name in (library, EXAMPLES)},
        working_bytes=working_bytes,
        versions=versions,
    )
    manifest.write(folder)
    return Artifact(folder, manifest)


def _ports(program: ExportedProgram, kind: str) -> tuple[Port, ...]:
    from torch.export.graph_signature import InputKind

    signature = program.graph_signature
    if kind == "placeholder":
        names = [spec.arg.name for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    else:
        names = [spec.arg.name for spec in signature.output_specs]
    if len(names) != 1:
        raise CompileError(f"the model has {len(names)} {'inputs' if kind == 'placeholder' else 'outputs'}; one is supported")
    nodes = {node.name: node for node in program.graph.nodes}
    value = nodes[names[0]].meta["val"]
    label = "input" if kind == "placeholder" else "output"
    return (Port(label, tuple(int(v) for v in value.shape), str(value.dtype).removeprefix("torch.")),)
