"""The C++ compiler that links what TVM compiled."""

from __future__ import annotations

import os
import platform
import shutil

from ..hwmodels.device import Device


def linker(device: Device) -> str | None:
    """The C++ compiler that links libraries for a device, None where there is none: `$CXX`, or the system's."""
    triple = _foreign(device)
    if triple:
        return shutil.which(f"{triple}-g++")
    named = os.environ.get("CXX")
    if named and shutil.which(named):
        return named
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def missing_linker(device: Device) -> str:
    """What to install where there is none."""
    triple = _foreign(device)
    package = f"g++-{triple.replace('_', '-')}" if triple else "g++"
    return f"no C++ compiler to link for it with; install one with `apt-get install {package}`"


def _foreign(device: Device) -> str:
    """The triple of a device of another architecture than this machine's, else nothing."""
    triple = device.target.get("mtriple", "")
    return triple if triple and triple.partition("-")[0] != platform.machine() else ""
