"""Every known device: usable here, or what is missing."""

from __future__ import annotations

import os

from ..compilers.registry import COMPILERS
from ..hwmodels.device import Device, described, host, parse_device


def list_devices() -> list[dict[str, object]]:
    """This machine's CPU at every thread count worth naming, then the described devices."""
    cores = os.cpu_count() or 1
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cores]
    here = [host() if n == 1 else parse_device(f"cpu?threads={n}") for n in counts]
    return [_row(device) for device in [*here, *described().values()]]


def _row(device: Device) -> dict[str, object]:
    lacking = next(compiler.missing(device) for compiler in COMPILERS if compiler.name == "tvm")
    return {
        "name": device.name,
        "kind": device.kind,
        "usable": lacking is None,
        "missing": lacking or "",
        "title": device.title,
        "threads": device.threads,
        "lanes": device.lanes,
        "features": list(device.features),
        "macs_per_s": {str(bits): rate for bits, rate in device.macs_per_s.items()},
        "bytes_per_s": device.bytes_per_s,
        "source": device.source,
    }
