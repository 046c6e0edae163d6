"""When a latency table is refused: others used the cores, or hardly a network met a quiet machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planish.hwmodels.device import host
from planish.hwmodels.load import BusyMachine, LoadWatch
from planish.search.latency_table import refuse_disturbed
from planish.search.table_measuring import refuse_loaded

pytestmark = pytest.mark.tvm


def test_what_was_timed_beside_others_is_refused() -> None:
    busy, free = LoadWatch(cores=2), LoadWatch(cores=2)
    busy.others, free.others = 1.9, 0.2
    device = host()
    with pytest.raises(BusyMachine, match=r"keep 1\.9 of 2 cores busy.*what was measured meanwhile is not kept"):
        refuse_loaded(busy, device)
    refuse_loaded(free, device)
    refuse_loaded(busy, replace(device, here=False, rpc="board:9090/cpu"))  # a board's own cores are its own


@pytest.mark.parametrize(
    ("quiet", "of", "refused"),
    [(3, 28, True), (6, 28, True), (7, 28, False), (2, 4, False), (1, 4, True), (0, 0, False)],
)
def test_a_table_needs_a_few_quiet_networks_or_half_of_them(quiet: int, of: int, refused: bool) -> None:
    flags = [number < quiet for number in range(of)]
    if not refused:
        refuse_disturbed(flags, "cpu")
        return
    with pytest.raises(BusyMachine, match=f"only {quiet} of {of}"):
        refuse_disturbed(flags, "cpu")
