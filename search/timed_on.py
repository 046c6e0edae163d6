"""`devices.json` in a run's folder: the processors that its latencies are of, so that no other one's join them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..hwmodels.device import Device
from ..hwmodels.fingerprint import fingerprint, processor_name
from .atomic import write_json
from .errors import UserError
from .json_text import parsed

NAME = "devices.json"


def keep_devices(run: Path, devices: Mapping[str, Device]) -> None:
    """Writes what the devices are, or compares them with what the run began on.

    A latency is a ratio to the original's, measured on the same processor; so is a prediction.

    Args:
        run: The run's folder.
        devices: By label, pinned.

    Raises:
        UserError: a device is another processor now, or the file is damaged.
    """
    path = run / NAME
    now = {label: {"device": fingerprint(device), "processor": _processor(device)} for label, device in devices.items()}
    if not path.exists():
        write_json(path, now)
        return
    try:
        before = {str(label): (str(d["device"]), str(d["processor"])) for label, d in parsed(path.read_bytes()).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} does not say what the run was timed on: {error}; on the machine where it began, delete the file"
        ) from None
    for label, (identity, processor) in before.items():
        if label in now and now[label]["device"] != identity:
            raise UserError(
                f"the latencies of the run in {run} are of another {label} ({processor}) than this one "
                f"({now[label]['processor']}); carry on where it began, or on a Ray cluster where that machine offers "
                f"device:{label} (docs/distributed.md), or start anew with another --out"
            )


def _processor(device: Device) -> str:
    return processor_name() if device.here else device.title
