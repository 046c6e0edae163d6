"""`devices.json` in a run's folder: the processors that its latencies are of, so that no other one's join them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..hwmodels.device import Device
from ..hwmodels.fingerprint import fingerprint, processor_name
from ..spaces.space import Kind
from .atomic import write_json
from .errors import UserError
from .json_text import parsed
from .rundir import RunDirectory
from .vectors import Vectors

NAME = "devices.json"


def keep_devices(run: Path, devices: Mapping[str, Device]) -> dict[str, Device]:
    """Writes what the devices are, or compares them with what the run began on; the devices as it began with them.

    A latency is a ratio to the original's, measured on the same processor; so is a prediction. Tiles that were measured
    since would make the candidates of today faster than those of yesterday.

    Args:
        run: The run's folder.
        devices: By label, pinned.

    Raises:
        UserError: a device is another processor now, or the file is damaged.
    """
    path = run / NAME
    now = {
        label: {
            "device": fingerprint(device),
            "processor": _processor(device),
            "lanes": device.lanes,
            "tiles": dict(sorted(device.tiles.items())),
        }
        for label, device in devices.items()
    }
    if not path.exists():
        write_json(path, now)
        return dict(devices)
    began = _read(path)
    for label, (identity, processor, _, _) in began.items():
        if label in now and now[label]["device"] != identity:
            raise UserError(
                f"the latencies of the run in {run} are of another {label} ({processor}) than this one "
                f"({now[label]['processor']}); carry on where it began, or on a Ray cluster where that machine offers "
                f"device:{label} (docs/distributed.md); here only train (planish resume --train-only), or start anew "
                f"with another --out; where it is the same processor, and only says otherwise of itself, delete {path}"
            )
    tiles = {label: known[3] for label, known in began.items() if known[3] is not None}
    return {label: replace(device, tiles=tiles.get(label, device.tiles)) for label, device in devices.items()}


def vectors_of(run: Path, lanes: int = 0) -> Vectors:
    """The vectors of the devices that a run began on: its space was made for them.

    Args:
        run: The run's folder.
        lanes: As the specification says; 0: the devices'.

    Raises:
        UserError: the run does not say it.
    """
    path = run / NAME
    if not path.exists():
        raise UserError(f"{path} is missing; carry on with the run where it began, once, with this version of planish")
    space = RunDirectory.open(run).space()
    bfloat16 = any(choice.kind is Kind.BITS and "bf16" in choice.options for choice in space.choices)
    return Vectors(lanes or max(lanes for _, _, lanes, _ in _read(path).values()), bfloat16)


def _read(path: Path) -> dict[str, tuple[str, str, int, dict[str, str] | None]]:
    """(fingerprint, processor, lanes, tiles) by label; no tiles of runs that were begun before they were kept."""
    try:
        found = {
            str(label): (str(d["device"]), str(d["processor"]), int(d["lanes"]), _tiles(d.get("tiles")))
            for label, d in parsed(path.read_bytes()).items()
        }
        if not found:
            raise ValueError("it names no device")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} does not say what the run was timed on: {error}; on the machine where it began, delete the file"
        ) from None
    return found


def _tiles(found: object) -> dict[str, str] | None:
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(tile, str) for tile in found.values()):
        raise ValueError(f"its tiles are {found!r}")
    return found


def _processor(device: Device) -> str:
    return processor_name() if device.here else device.title
