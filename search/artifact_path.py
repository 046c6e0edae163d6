"""Where a trial's compiled models are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def artifact_path(trial_folder: Path, labels: Sequence[str], label: str, name: str = "artifact") -> Path:
    """The folder of a trial's artifact for a device: `artifact`, or `artifact-DEVICE` in a run of several devices.

    Args:
        labels: All devices of the run.
        label: The device.
    """
    return trial_folder / (name if len(labels) == 1 else f"{name}-{path_name(label)}")


def path_name(label: str) -> str:
    """A device's label as the name of a folder."""
    return "".join(c if c.isalnum() else "-" for c in label)
