"""A device of this machine as others see it: nothing about it is left to whatever machine looks."""

from __future__ import annotations

from dataclasses import replace

from ..hwmodels.device import Device
from ..hwmodels.fingerprint import fingerprint, siblings
from .cpu_features import instruction_set


def pinned(device: Device) -> Device:
    """The device with its processor, instructions and fingerprint named; one that is not here as it is.

    A Ray cluster's nodes compile for the machine that candidates are timed on, whatever processors they have
    themselves, and predict with its kernel times.
    """
    if not device.here or device.instructions:
        return device
    from tvm.target import codegen

    target = dict(device.target)
    if target.get("mcpu") == "host":
        target["mcpu"] = str(codegen.llvm_get_system_cpu())
    return replace(
        device,
        target=target,
        instructions=instruction_set(),
        identity=fingerprint(device),
        siblings=siblings(device),
    )
