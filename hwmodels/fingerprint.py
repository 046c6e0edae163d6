"""What tells one machine's CPU from another's, so that nobody takes the times of one for the other's."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path

from .device import Device, cpu_flags

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Of a description what is no part of the device: what was found out about it, and of `rpc://.../cpu` this machine's
# clock of the moment.
_CHANGING = ("siblings", "tiles", "macs_per_s", "bytes_per_s", "memory_bytes", "title", "source")
_NAMES = ("vendor_id", "model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")


def fingerprint(device: Device) -> str:
    """16 hexadecimal digits: equal for equal processors with the same caches, instructions and threads.

    The clock is not part of it, because it changes by the minute; nor are names of hosts. A described device is told by
    its description.
    """
    if device.identity:
        return device.identity
    about: dict[str, object] = {"threads": device.threads, "target": dict(device.target)}
    if device.here:
        about |= {"machine": platform.machine(), "cpu": _processor(), "flags": sorted(cpu_flags()), "caches": _caches()}
    else:
        about |= {"described": {key: value for key, value in asdict(device).items() if key not in _CHANGING}}
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def siblings(device: Device) -> dict[int, str]:
    """The fingerprints of this machine's processor with other numbers of threads, by the number."""
    numbers = range(1, 1 + (os.cpu_count() or 1))
    return {n: fingerprint(replace(device, threads=n)) for n in numbers if n != device.threads}


def processor_name() -> str:
    """What this machine's processor calls itself."""
    about = _processor()
    return about.get("model name") or about.get("CPU part") or about.get("name") or platform.machine()


def _processor() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {"name": platform.processor()}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip() in _NAMES}


def _caches() -> list[str]:
    found = []
    for folder in sorted(_CACHES.glob("index*")):
        try:
            found.append(
                " ".join((folder / name).read_text(encoding="utf-8").strip() for name in ("level", "type", "size"))
            )
        except OSError:
            continue
    return found
