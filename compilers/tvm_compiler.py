"""The TVM compiler for CPUs."""

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


class TvmCompiler:
    """See `Compiler`."""

    name = "tvm"

    def missing(self, device: Device) -> str | None:
        """See `Compiler.missing`."""
        if device.kind != "cpu":
            return f"Planish has no schedules for {device.kind} devices yet"
        from .linker import linker, missing_linker

        return None if linker(device) else missing_linker(device)

    def compile(
        self, program: ExportedProgram, device: Device, folder: Path, examples: torch.Tensor, *, tolerance: float
    ) -> Artifact:
        """See `Compiler.compile`."""

        def build(library: Path) -> Built:
            from .tvm_build import build_library

            return build_library(program, device, library)

        return write_artifact(
            self,
            "model.so",
            build,
            program,
            device,
            folder,
            examples,
            tolerance,
            {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi", "torch")},
        )

    def measure(
        self, artifacts: Mapping[str, Path], device: Device, protocol: MeasureProtocol
    ) -> Mapping[str, Measurement]:
        """See `Compiler.measure`."""
        return runner.measure(artifacts, device, protocol)
