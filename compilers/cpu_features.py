"""Which instructions a compiled model may hold, so that it is refused where they are missing instead of crashing there.

Needs the standard library only. Code for the CPU that compiles it may use anything that this CPU has, so all of what a
compiler makes of numeric code is recorded; the names are those of `/proc/cpuinfo`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace

from ..hwmodels.device import Device, DeviceError, cpu_flags, host, parse_device
from .manifest import Manifest

# Vectors, fused multiply-add, bit manipulation (`abm` is lzcnt).
_X86 = """
    pni ssse3 sse4_1 sse4_2 movbe popcnt f16c fma abm bmi1 bmi2 avx avx2 avx_vnni fma4 xop gfni
    avx512f avx512dq avx512cd avx512bw avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg
    avx512_vpopcntdq avx512_bf16 avx512_fp16
"""
_ARM = "asimd fphp asimdhp asimdrdm asimddp atomics sve sve2 i8mm bf16 svei8mm svebf16"
# In a manifest's target: the device was described by the user's own file.
BY_FILE = "described_by"
_USED = frozenset(_X86.split()) | frozenset(_ARM.split())


def instruction_set() -> dict[str, str]:
    """What code for this CPU may use, as a manifest's target records it: `machine` and `features`."""
    return {"machine": platform.machine(), "features": " ".join(sorted(cpu_flags() & _USED))}


def described_instructions(device: Device) -> dict[str, str]:
    """The same of a device that is only described, as far as its description says."""
    machine = device.target.get("mtriple", "").partition("-")[0]
    features = " ".join(sorted(_USED & set(device.features)))
    return {**({"machine": machine} if machine else {}), **({"features": features} if features else {})}


def device_of(manifest: Manifest) -> Device:
    """The device that an artifact runs on; this machine's CPU, where it has what one from a TOML file has.

    Raises:
        DeviceError: this machine lacks something that the code needs, or its device is not usable from here.
    """
    if absent := lacking(manifest.target):
        raise DeviceError(absent)
    try:
        return parse_device(manifest.device)
    except DeviceError:
        # The file that described it is not part of the artifact; what it needs is.
        if BY_FILE not in manifest.target:
            raise
        return replace(host(), name=manifest.device, threads=manifest.threads)


def lacking(target: Mapping[str, str]) -> str | None:
    """What this CPU lacks of a recorded instruction set, None where it lacks nothing or nothing is recorded."""
    here = instruction_set()
    machine = target.get("machine", here["machine"])
    if machine != here["machine"]:
        return f"a CPU of the kind {machine} (this one is {here['machine']})"
    # An operating system that lists no features may have them all: only the run can tell.
    absent = set(target.get("features", "").split()) - set(here["features"].split()) if here["features"] else set()
    return ", ".join(sorted(absent)) or None
