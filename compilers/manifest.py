"""`manifest.json`: what a compiled model's folder holds, checked before anything in it is loaded.

Needs the standard library only, so that an artifact's user can read it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 1
NAME = "manifest.json"
EXAMPLES = "examples.npz"


class ManifestError(ValueError):
    """A folder that is no artifact, or whose files are not the ones that the manifest names."""


@dataclass(frozen=True)
class Port:
    """An input or an output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """A compiled model: files with their SHA-256, inputs, outputs, and what it was made for."""

    compiler: str
    library: str
    device: str
    target: Mapping[str, str]
    threads: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    tolerance: float
    files: Mapping[str, str]
    working_bytes: int = 0
    # (kernel, site) of every call of a kernel that has a site, in order: what a profile's times belong to.
    kernels: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    # Free for the exporter: preprocessing, class names, metrics, choices.
    model: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, default=list)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> Manifest:
    """The manifest of a folder, after every file that it names was compared with its checksum.

    Raises:
        ManifestError: no manifest, a broken one, a file that is missing or changed, or a path out of the folder.
    """
    manifest = _parse(folder)
    for name, expected in manifest.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ManifestError(f"{folder / NAME} names the file {name!r}, which is not inside the folder")
        file = folder / path
        try:
            found = digest(file) if file.is_file() else None
        except OSError as error:  # a name that is too long, or a file that is not ours to read
            raise ManifestError(f"{folder / NAME} names a file that cannot be read: {error}") from None
        if found is None:
            raise ManifestError(f"{file} is missing; export the artifact again")
        if found != expected:
            raise ManifestError(f"{file} is not the file that was exported (its SHA-256 differs); export it again")
    if manifest.library not in manifest.files:
        raise ManifestError(f"{folder / NAME} gives no checksum for its library {manifest.library!r}")
    return manifest


def _parse(folder: Path) -> Manifest:
    path = folder / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{folder} is no compiled model (no {NAME}); make one with `planish export`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    try:
        if data["format"] != FORMAT:
            raise ManifestError(f"{path} has the format {data['format']!r}; this version reads {FORMAT}")
        return Manifest(
            compiler=str(data["compiler"]),
            library=str(data["library"]),
            device=str(data["device"]),
            target={str(k): str(v) for k, v in data["target"].items()},
            threads=int(data["threads"]),
            inputs=_ports(data["inputs"]),
            outputs=_ports(data["outputs"]),
            tolerance=float(data["tolerance"]),
            files={str(k): str(v) for k, v in data["files"].items()},
            working_bytes=int(data["working_bytes"]),
            kernels=tuple((str(kernel), str(site)) for kernel, site in data.get("kernels", ())),
            versions=dict(data["versions"]),
            model=dict(data["model"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path} is not a manifest: {type(error).__name__} {error}") from None


def _ports(data: Any) -> tuple[Port, ...]:
    return tuple(Port(str(p["name"]), tuple(int(v) for v in p["shape"]), str(p["dtype"])) for p in data)
