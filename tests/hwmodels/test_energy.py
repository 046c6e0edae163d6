"""Modelled energy against sums made by hand from the cited figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planish.hwmodels.energy import energy_j
from planish.hwmodels.workload import Workload

WORK = Workload("a", "conv2d", {}, macs=1000, moved_bytes=500, bits=32, weight_bytes=100)


def test_arithmetic_and_traffic_add_up() -> None:
    # 1000 x (3.7 + 0.9) pJ, 500 bytes at 100 pJ for 8.
    assert energy_j([WORK]) == pytest.approx(1000 * 4.6e-12 + 500 * 12.5e-12)
    assert energy_j([WORK, WORK]) == pytest.approx(2 * energy_j([WORK]))
    assert energy_j([]) == 0


def test_narrow_numbers_take_less_and_those_narrower_than_bytes_as_much_as_bytes() -> None:
    arithmetic = [energy_j([replace(WORK, bits=bits, moved_bytes=0, weight_bytes=0)]) for bits in (4, 8, 16, 32)]
    assert arithmetic == pytest.approx([0.3e-9, 0.3e-9, 2.0e-9, 4.6e-9])


def test_weights_that_no_cache_holds_come_from_memory() -> None:
    large = replace(WORK, macs=0, moved_bytes=10 << 20, weight_bytes=10 << 20)
    assert energy_j([large]) == pytest.approx((10 << 20) * 250e-12)
    # Together they count, not each alone.
    half = replace(large, moved_bytes=5 << 20, weight_bytes=5 << 20)
    assert energy_j([half]) == pytest.approx((5 << 20) * 12.5e-12)
    assert energy_j([half, half]) == pytest.approx((10 << 20) * 250e-12)
