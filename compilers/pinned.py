"""A device of this machine as others see it: nothing about it is left to whatever machine looks."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..hwmodels.device import Device
from ..hwmodels.fingerprint import fingerprint, siblings
from ..hwmodels.kernel_database import DatabaseError
from .cpu_features import instruction_set
from .kernel_times import database_of


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
        tiles=_measured_tiles(device),
    )


def _measured_tiles(device: Device) -> dict[str, str]:
    try:
        return database_of(device).tiles()
    except DatabaseError as error:
        # Without them everything is compiled as if nothing had been measured.
        logging.getLogger(__name__).warning("%s", error)
        return {}
