"""The Compiler role: an exported model to something that runs on a device, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from ..hwmodels.device import Device
    from ..hwmodels.measurement import Measurement, MeasureProtocol


class CompileError(RuntimeError):
    """A model or a device that the compiler cannot take; the message names what and why."""


@dataclass(frozen=True)
class Artifact:
    """A compiled model in a folder."""

    path: Path
    device: str
    compiler: str
    inputs: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype
    outputs: tuple[tuple[str, tuple[int, ...], str], ...]
    library_bytes: int
    # Bytes of the intermediate values in the compiler's static memory plan; 0 where it has none.
    working_bytes: int = 0


class Compiler(Protocol):
    """What compiles for one kind of device.

    A compiler never runs what it built in the calling process: the code may crash or never end.
    """

    name: str

    def compile(self, program: ExportedProgram, device: Device, folder: Path) -> Artifact:
        """Writes a compiled model into `folder`, which must not exist or be empty.

        Raises:
            CompileError: the model or the device cannot be compiled.
        """
        ...

    def run(self, artifact: Artifact, inputs: Path, outputs: Path, *, time_limit_s: float) -> None:
        """Runs the artifact on the arrays of an npz file (`input_0`, ...) and writes `output_0`, ... to another.

        Raises:
            RunError: the child process crashed, failed or took longer than the limit.
        """
        ...

    def measure(
        self, artifacts: Mapping[str, Artifact], device: Device, protocol: MeasureProtocol
    ) -> Mapping[str, Measurement]:
        """Times artifacts in turn (A B A B) in one or more child processes.

        Raises:
            RunError: an artifact crashed, failed or took longer than the limit; it is named.
        """
        ...


class RunError(RuntimeError):
    """Compiled code that crashed, hung or failed; the message names the artifact and the reason."""
