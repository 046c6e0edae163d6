"""torch itself as a compiler: the reference that everything else is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..hwmodels.device import Device
from ..hwmodels.measurement import Measurement, MeasureProtocol
from . import runner
from .artifact import Built, write_artifact
from .compiler import Artifact

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


class NativeCompiler:
    """Saves the exported program; torch runs it. See `Compiler`."""

    name = "torch"

    def missing(self, device: Device) -> str | None:
        """See `Compiler.missing`."""
        return None if device.kind == "cpu" and device.here else "torch runs on this machine's CPU only"

    def compile(
        self, program: ExportedProgram, device: Device, folder: Path, examples: torch.Tensor, *, tolerance: float
    ) -> Artifact:
        """See `Compiler.compile`."""
        import torch

        def save(path: Path) -> Built:
            torch.export.save(program, str(path))
            return Built()

        return write_artifact(
            self, "model.pt2", save, program, device, folder, examples, tolerance, {"torch": version("torch")}
        )

    def measure(
        self, artifacts: Mapping[str, Path], device: Device, protocol: MeasureProtocol
    ) -> Mapping[str, Measurement]:
        """See `Compiler.measure`."""
        return runner.measure(artifacts, device, protocol)
