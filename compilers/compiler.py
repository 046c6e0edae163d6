"""The Compiler role: an exported model to something that runs on a device, and how long that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from ..hwmodels.device import Device
    from ..hwmodels.measurement import Measurement, MeasureProtocol
    from .manifest import Manifest


class CompileError(RuntimeError):
    """A model or a device that the compiler cannot take; the message names what and why."""


class RunError(RuntimeError):
    """Compiled code that crashed, hung, failed or computed something else.

    `artifact` is its name in the call, None where the failure is not one artifact's. `crashed` says that a signal ended
    the process: the code's own doing, or the system's.
    """

    def __init__(self, message: str, artifact: str | None = None, *, crashed: bool = False) -> None:
        super().__init__(message)
        self.artifact, self.crashed = artifact, crashed


@dataclass(frozen=True)
class Artifact:
    """A compiled model in a folder: library, `manifest.json`, `examples.npz`."""

    path: Path
    manifest: Manifest


class Compiler(Protocol):
    """What compiles for one kind of device.

    A compiler never runs what it built in the calling process: the code may crash or never end.
    """

    name: str

    def missing(self, device: Device) -> str | None:
        """What keeps this compiler from compiling for the device, None where nothing does.

        Whether something can be timed there is the device's own `timed`.
        """
        ...

    def compile(
        self, program: ExportedProgram, device: Device, folder: Path, examples: torch.Tensor, *, tolerance: float
    ) -> Artifact:
        """Writes a compiled model into `folder`, with the outputs that torch gives for the examples.

        Args:
            program: A program of one input of shape (batch, ...).
            device: What it must run on.
            folder: Must not exist, or be empty.
            examples: Inputs of shape (count, batch, ...); the program itself gives the expected outputs.
            tolerance: Largest difference from torch that is allowed, relative to the largest output.

        Raises:
            CompileError: the model or the device cannot be compiled.
        """
        ...

    def measure(
        self, artifacts: Mapping[str, Path], device: Device, protocol: MeasureProtocol
    ) -> Mapping[str, Measurement]:
        """Checks every artifact against its stored outputs and times them in turn (A B A B) in child processes.

        Raises:
            RunError: an artifact crashed, failed, took too long or gave other outputs; it is named.
        """
        ...
