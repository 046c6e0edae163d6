"""A device's latency model from the table of the same processor with another number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..hwmodels.device import Device
from ..hwmodels.kernel_database import KernelDatabase, NetworkTime
from ..hwmodels.transfer import LEAST, TransferModel
from .fitted import fitted

# Kernels that make a table, to predict by and to carry over from: a small model's space has no more.
ENOUGH = 60


def carried_over(
    device: Device, database: KernelDatabase, networks: Sequence[NetworkTime]
) -> tuple[TransferModel | None, str]:
    """The model, and where it is from or why there is none; see `TransferModel.trusted` for whether to use it.

    Args:
        device: What is to be predicted.
        database: Holds the times of the processor's other numbers of threads too.
        networks: That were measured on the device; those that met a quiet machine count where they are enough.

    Raises:
        DatabaseError: the database is damaged.
    """
    source = source_of(device, database)
    if source is None:
        return None, "no other number of threads has a table"
    quiet = [network for network in networks if network.time.quiet]
    probes = quiet if len(quiet) >= LEAST else list(networks)
    if len(probes) < LEAST:
        return None, f"{len(probes)} networks were measured; {LEAST} are needed"
    threads, own = source
    other = replace(device, threads=threads, identity=own.device)
    model = fitted(other, own.times(), own.networks())
    found = TransferModel.fit(
        device, model, [network.workloads for network in probes], [network.time.median_s for network in probes]
    )
    return found, f"the table of {threads} thread{'s' * (threads > 1)}"


def source_of(device: Device, database: KernelDatabase) -> tuple[int, KernelDatabase] | None:
    """The number of threads whose kernels are known best, and its times; None where none is known well enough."""
    held = {c.device: c.kernels for c in database.contents() if c.schedules == database.schedules}
    counts = {threads: held.get(identity, 0) for threads, identity in device.siblings.items()}
    known = [threads for threads, count in counts.items() if threads != device.threads and count >= ENOUGH]
    if not known:
        return None
    threads = max(known, key=lambda number: (counts[number], -number))
    return threads, KernelDatabase(database.path, device.siblings[threads], database.schedules)
