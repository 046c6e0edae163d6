"""Which of several latency models a device is predicted by."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.hwmodels.corrector import Corrector
from planish.hwmodels.device import host
from planish.hwmodels.held_out import held_out
from planish.hwmodels.kernel_database import KernelDatabase, KernelTime, NetworkTime
from planish.hwmodels.quiet import Settled
from planish.hwmodels.table import TableModel
from planish.hwmodels.transfer import TransferModel
from planish.hwmodels.workload import Workload
from planish.search.model_choice import best_known, lower_error, own_table

ERRORS = held_out([1.0], [1.0])


def dense(size: int) -> Workload:
    return Workload("", "dense", {"m": 1, "k": size}, 4 * size, 16 * size, 32, 16 * size, 1, "", 4.0 * size)


def settled(seconds: float) -> Settled:
    return Settled(seconds, 0.99 * seconds, 1.01 * seconds, 12, True)


@pytest.mark.parametrize(("own", "carried", "better"), [(0.02, 0.05, "own"), (0.05, 0.02, "carried")])
def test_the_model_that_states_the_lower_error_is_taken(own: float, carried: float, better: str) -> None:
    """Kernels of tile contests are a table of their own, and a bad one."""
    table = TableModel(host(), {}, None, Corrector(error=own, networks=12))
    transfer = TransferModel(host(), table, (1.0, 0.5, 0.0), carried, ERRORS)
    assert lower_error(transfer, table) is {"own": table, "carried": transfer}[better]
    assert lower_error(None, table) is table
    assert lower_error(transfer, None) is transfer
    assert lower_error(None, None) is None


@pytest.mark.parametrize(
    ("kernels", "networks", "there"), [(59, 0, False), (60, 0, True), (30, 8, True), (10, 8, False)]
)
def test_few_kernels_are_a_table_where_networks_say_how_wrong_they_are(
    tmp_path: Path, kernels: int, networks: int, there: bool
) -> None:
    database = KernelDatabase(tmp_path / "times.sqlite", "device", "v1")
    works = [dense(8 * number) for number in range(1, kernels + 1)]
    database.add([KernelTime(work, settled(1e-7 * n)) for n, work in enumerate(works, start=1)], {})
    nets = [(works[n], works[n + 1]) for n in range(networks)]
    database.add([NetworkTime(net, settled(1e-7 * (2 * n + 3))) for n, net in enumerate(nets)], {})
    found = own_table(host(), database, database.networks())
    assert (found is not None) == there
    assert best_known(host(), database) == found
