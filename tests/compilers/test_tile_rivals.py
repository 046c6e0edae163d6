"""Tiles that are measured: which are rivals, and that what is compiled takes the one that was found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from planish.compilers.cpu.convspec import ConvSpec, Step
from planish.compilers.cpu.machine import Machine
from planish.compilers.cpu.tiles import PARALLEL_MACS, WinogradTile, choices, chosen
from planish.hwmodels.device import host

SPEC = ConvSpec(1, 64, 28, 28, 64, (3, 3), padding=(1, 1, 1, 1), lanes=8, in_lanes=8, steps=(Step("relu"),))
MACHINE = Machine(8, 16, fmas=2, latency=4)


def test_a_tile_that_was_measured_is_taken_and_one_that_is_none_is_not() -> None:
    usual = chosen(SPEC, MACHINE)
    other = choices(SPEC, MACHINE)[7]
    assert usual == (SPEC, choices(SPEC, MACHINE)[0])
    assert chosen(SPEC, replace(MACHINE, tiles={repr(SPEC): repr(other)})) == (SPEC, other)
    assert chosen(SPEC, replace(MACHINE, tiles={repr(SPEC): "Tile(of=another)"})) == usual
    assert chosen(SPEC, replace(MACHINE, tiles={repr(replace(SPEC, c=32)): repr(other)})) == usual


def test_measured_tiles_are_no_part_of_a_kernels_key() -> None:
    assert repr(replace(MACHINE, tiles={"a": "b"})) == repr(MACHINE)
    assert replace(MACHINE, tiles={"a": "b"}) == MACHINE


@pytest.mark.parametrize("size", [2, 8, 28, 112])
@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("kernel", [1, 3])
def test_threads_are_taken_where_they_are_estimated_to_pay(size: int, channels: int, kernel: int) -> None:
    pad = kernel // 2
    spec = ConvSpec(1, channels, size, size, channels, (kernel, kernel), padding=(pad,) * 4, lanes=8, in_lanes=8)
    found, tile = chosen(spec, replace(MACHINE, threads=4))
    assert found.threads in (1, 4)
    if spec.macs < PARALLEL_MACS:
        assert found.threads == 1
    assert (found, tile) == (replace(spec, threads=found.threads), choices(found, MACHINE)[0])
    if spec.macs > 100 * PARALLEL_MACS:
        assert found.threads == 4


@pytest.mark.tvm
def test_rivals_are_of_the_form_that_is_taken_and_take_what_the_program_hands_them() -> None:
    from planish.compilers.tile_rivals import contests
    from planish.compilers.tvm_workloads import plan

    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 48, 1, stride=2),
    ).eval()  # fmt: skip
    program = torch.export.export(net, (torch.zeros(1, 3, 16, 16),))
    found = list(contests(program, host()))
    called: dict[Any, Any] = {work.kernel.subject: work for work in plan(program, host()).kernels.values()}
    assert len(found) == 3  # the depthwise one has no tiles to choose from
    for contest in found:
        subjects: list[Any] = [work.kernel.subject for work in contest.works.values()]
        taken, *rivals = subjects
        assert called[taken].arguments == next(iter(contest.works.values())).arguments
        assert called[taken].workload.key() == next(iter(contest.works.values())).workload.key()
        assert rivals
        # The store gives both the same object code, in which the symbol stands.
        assert _in_store(called[taken].kernel) == _in_store(next(iter(contest.works.values())).kernel)
        for spec, tile in rivals:
            assert spec == taken[0]
            assert tile != taken[1]
            assert isinstance(tile, WinogradTile) == isinstance(taken[1], WinogradTile)
            assert getattr(tile, "m", 0) == getattr(taken[1], "m", 0)
    # What was measured is not measured again, and is what is compiled.
    first = found[0]
    rival = list(first.works)[-1]
    tuned = replace(host(), tiles={first.convolution: rival})
    assert [contest.convolution for contest in contests(program, tuned)] == [c.convolution for c in found[1:]]
    compiled = [_in_store(work.kernel) for work in plan(program, tuned).kernels.values()]
    assert _in_store(first.works[rival].kernel) in compiled


def _in_store(kernel: Any) -> tuple[Any, ...]:
    return kernel.subject, kernel.key, kernel.symbol
