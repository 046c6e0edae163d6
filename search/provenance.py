"""Where a run came from: versions, commit, devices, seed and command, without names of the machine or its folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .config import Spec

_PACKAGES = (
    "planish", "torch", "apache-tvm", "apache-tvm-ffi", "numpy", "optuna", "ray", "scikit-learn", "torch-pruning",
)  # fmt: skip


def provenance(
    spec: Spec, command: str, devices: Sequence[Mapping[str, object]] = (), clock: float | None = None
) -> dict[str, object]:
    """What provenance.json holds.

    Args:
        spec: Its seed is recorded.
        command: As `command_text.command_line` gives it.
        devices: What is known of every device (name, processor, threads), in the order of the specification.
        clock: Seconds since 1970; None: now.
    """
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock)),
        "command": command,
        "seed": spec.seed,
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "devices": [dict(device) for device in devices],
        "python": platform.python_version(),
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with `+changes` where files differ from it; None for an installed package."""
    folder = Path(__file__).resolve().parent
    # An environment's site-packages may lie inside somebody else's repository.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
