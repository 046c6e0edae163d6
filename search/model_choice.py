"""Which latency model a device is predicted by: the one that states the least error."""

from __future__ import annotations

from collections.abc import Sequence

from ..hwmodels.corrector import LEAST as LEAST_NETWORKS
from ..hwmodels.device import Device
from ..hwmodels.kernel_database import KernelDatabase, NetworkTime
from ..hwmodels.regression import LEAST as LEAST_KERNELS
from ..hwmodels.table import TableModel
from ..hwmodels.transfer import TransferModel
from .fitted import fitted
from .transferred import ENOUGH, carried_over


def best_known(device: Device, database: KernelDatabase) -> TableModel | TransferModel | None:
    """The device's own table or that of another number of threads; None where there is neither.

    Kernels alone do not make a table: those that tile contests left are of the original's convolutions, and another
    model's may be of other sizes. What a model states of networks that it was not fitted to tells.

    Raises:
        DatabaseError: the database is damaged.
    """
    networks = database.networks()
    carried, _ = carried_over(device, database, networks)
    return lower_error(carried, own_table(device, database, networks))


def own_table(device: Device, database: KernelDatabase, networks: Sequence[NetworkTime]) -> TableModel | None:
    """The model of the device's own kernels, if they are a table's or a few networks say how wrong they are."""
    times = database.times()
    if len(times) < LEAST_KERNELS:
        return None
    model = fitted(device, times, networks)
    return model if len(times) >= ENOUGH or model.corrector.networks >= LEAST_NETWORKS else None


def lower_error(carried: TransferModel | None, own: TableModel | None) -> TableModel | TransferModel | None:
    """Of two models the one that states the lower error of networks."""
    if carried is None or own is None:
        return own if carried is None else carried
    return own if own.corrector.error <= carried.error else carried
