"""Which layers take a few images of a batch at a time: what follows from sizes, caches and weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.compilers.cpu.machine import Machine
from planish.compilers.cpu.sub_batch import Layer, SubBatch, sub_batch

MB = 1 << 20
MACHINE = Machine(8, 16, fmas=2, caches=(32 << 10, 512 << 10, 12 * MB), line_cycles=(1.0, 2.0, 15.0))
TWO = Machine(8, 16, threads=2, fmas=2, caches=(32 << 10, 512 << 10, 12 * MB), line_cycles=(1.0, 2.0, 15.0))
EVERYWHERE = range(100)


def test_what_the_second_level_holds_is_not_split() -> None:
    assert sub_batch([Layer(60 << 10, 0, 10**6)] * 10, EVERYWHERE, 8, MACHINE) is None


def test_large_images_and_small_weights_go_one_by_one_to_the_end() -> None:
    layers = [Layer(6 * MB, 10_000, 10**7)] * 10
    assert sub_batch(layers, EVERYWHERE, 8, MACHINE) == SubBatch(9, 1)
    # Two threads share the images that go together.
    assert sub_batch(layers, EVERYWHERE, 8, TWO) == SubBatch(9, 2)


def test_what_is_all_weights_is_not_split() -> None:
    assert sub_batch([Layer(600 << 10, 20 * MB, 10**6)] * 10, EVERYWHERE, 8, MACHINE) is None


def test_a_split_ends_where_weights_outgrow_images() -> None:
    layers = [Layer(6 * MB, 10_000, 10**7)] * 5 + [Layer(100 << 10, 30 * MB, 10**7)] * 5
    assert sub_batch(layers, EVERYWHERE, 8, MACHINE) == SubBatch(4, 1)


def test_a_split_ends_at_a_cut() -> None:
    layers = [Layer(6 * MB, 10_000, 10**7)] * 10
    found = sub_batch(layers, {2, 7}, 8, MACHINE)
    assert found is not None
    assert found.last == 7
    assert sub_batch(layers, set(), 8, MACHINE) is None


def test_where_arithmetic_takes_the_time_nothing_is_split() -> None:
    assert sub_batch([Layer(6 * MB, 10_000, 10**10)] * 10, EVERYWHERE, 8, MACHINE) is None


@given(st.integers(1, 4096), st.sampled_from([MACHINE, TWO]), st.integers(1, 8))
def test_parts_are_whole_not_too_many_and_a_multiple_of_the_threads(
    batch: int, machine: Machine, megabytes: int
) -> None:
    found = sub_batch([Layer(megabytes * MB, 1000, 10**6)] * 4, EVERYWHERE, batch, machine)
    if found is not None:
        assert batch % found.images == 0
        assert 2 <= batch // found.images <= 16
        assert found.images % machine.threads == 0


@pytest.mark.parametrize("machine", [MACHINE, TWO])
def test_heavier_weights_never_make_smaller_parts(machine: Machine) -> None:
    images = []
    for weights in (0, 1, 4, 16, 64, 256):
        found = sub_batch([Layer(2 * MB, weights * MB, 10**7)] * 6, {5}, 8, machine)
        images.append(8 if found is None else found.images)
    assert images[0] < 8
    assert all(a <= b for a, b in pairwise(images))
