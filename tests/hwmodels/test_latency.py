"""What every latency model keeps to, whichever it is; and the roofline against its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.hwmodels.corrector import Corrector
from planish.hwmodels.cycles import CountedCycles
from planish.hwmodels.device import Device, described, host
from planish.hwmodels.held_out import held_out
from planish.hwmodels.kernel_database import KernelTime
from planish.hwmodels.latency import LatencyModel
from planish.hwmodels.quiet import Settled
from planish.hwmodels.regression import KernelRegression
from planish.hwmodels.roofline import Roofline
from planish.hwmodels.table import TableModel
from planish.hwmodels.transfer import TransferModel
from planish.hwmodels.workload import Workload


def _table(device: Device) -> TableModel:
    """A table of a few kernels with a regression for all others, and what whole networks add."""
    sizes = [(c, o, pixels, bits) for c in (3, 16, 64) for o in (1, 16, 257) for pixels in (1, 64) for bits in (8, 32)]
    works = [work_of(c, o, pixels, bits, "a") for c, o, pixels, bits in sizes]
    times = [KernelTime(w, Settled(s, s, s, 12, True)) for w in works for s in [1e-6 + w.macs * 1e-10]]
    return TableModel(
        device,
        {t.workload.key(): t for t in times},
        KernelRegression.fit(times),
        Corrector(1e-6, 1.1, 1e-11, 0.0, 0.05, 9),
    )


_TABLE = cache(lambda: _table(host()))

MODELS: dict[str, Callable[[Device], LatencyModel]] = {
    "roofline": lambda device: Roofline(device),
    "table": lambda device: replace(_TABLE(), device=device),
    "transfer": lambda device: TransferModel(device, _TABLE(), (1.0, 0.5, 1e-11), 0.1, held_out([1.0], [1.0])),
    "described": lambda device: CountedCycles.described(device, 16),
    "scaled roofline": lambda device: Roofline(device, factor=2.5, launch_s=1e-5, error=0.3),
}
DEVICES = [host(), *described().values()]
ROOFLINES = [MODELS[name] for name in ("roofline", "described", "scaled roofline")]
# A table is of one device; what a roofline says depends on it.
CASES = [(MODELS[name], host()) for name in ("table", "transfer")] + [(r, d) for r in ROOFLINES for d in DEVICES]

_SIZES = st.sampled_from([1, 3, 16, 64, 257])


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """A 1x1 convolution with the MACs and bytes that follow from its shapes."""
    c, o, pixels, bits = draw(_SIZES), draw(_SIZES), draw(_SIZES), draw(st.sampled_from([2, 4, 8, 16, 32]))
    return work_of(c, o, pixels, bits, draw(st.sampled_from("abc")))


def work_of(c: int, o: int, pixels: int, bits: int, site: str) -> Workload:
    """See `workloads`."""
    moved = (c * o * bits) // 8 + 4 * pixels * (c + o)
    return Workload(site, "conv2d", {"c": c, "o": o, "p": pixels}, c * o * pixels, moved, bits)


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Callable[[Device], LatencyModel]:
    return MODELS[request.param]


@pytest.fixture(params=DEVICES, ids=lambda device: device.name)
def device(request: pytest.FixtureRequest) -> Device:
    found: Device = request.param
    return found


@pytest.fixture
def model(build: Callable[[Device], LatencyModel], device: Device) -> LatencyModel:
    return build(device)


def test_the_model_says_which_device_it_is_about(model: LatencyModel, device: Device) -> None:
    assert model.device == device


def test_an_empty_model_takes_no_time(model: LatencyModel) -> None:
    prediction = model.predict([])
    assert (prediction.latency_s, prediction.std_s, dict(prediction.site_s)) == (0.0, 0.0, {})


@settings(max_examples=30)  # a forest takes milliseconds to predict
@given(st.data())
def test_the_sites_times_add_up_to_the_latency(data: st.DataObject) -> None:
    for build in MODELS.values():
        works = data.draw(st.lists(workloads(), max_size=6))
        prediction = build(host()).predict(works)
        assert sum(prediction.site_s.values()) == pytest.approx(prediction.latency_s)
        assert set(prediction.site_s) == {work.site for work in works}
        assert prediction.std_s >= 0


@settings(max_examples=30)
@given(st.lists(workloads(), max_size=5), st.lists(workloads(), max_size=5))
def test_operators_run_one_after_the_other(first: list[Workload], second: list[Workload]) -> None:
    for build in MODELS.values():
        model = build(host())
        alone = model.predict(first).latency_s + model.predict(second).latency_s
        assert model.predict([*first, *second]).latency_s == pytest.approx(alone)
        assert model.predict([*second, *first]).latency_s == pytest.approx(alone)


@settings(max_examples=30)
@given(workloads(), st.integers(1, 10**9), st.integers(1, 10**9))
def test_more_of_the_same_work_never_takes_less(work: Workload, macs: int, moved: int) -> None:
    for build, device in CASES:
        model = build(device)
        now = model.predict([work]).latency_s
        assert now > 0
        assert isfinite(now)
        for more in (replace(work, macs=work.macs + macs), replace(work, moved_bytes=work.moved_bytes + moved)):
            assert model.predict([more]).latency_s >= now


@given(workloads())
def test_by_a_roofline_wider_operands_never_take_less(work: Workload) -> None:
    for device in DEVICES:
        for build in ROOFLINES:
            model = build(device)
            times = [model.predict([replace(work, bits=bits)]).latency_s for bits in (1, 2, 4, 8, 16, 32, 64)]
            assert times == sorted(times)


def test_the_roofline_is_the_larger_of_arithmetic_and_traffic() -> None:
    machine = replace(host(), macs_per_s={32: 100.0, 8: 400.0}, bytes_per_s=10.0)
    busy = Workload("a", "conv2d", {}, macs=1000, moved_bytes=20)
    starved = Workload("b", "conv2d", {}, macs=100, moved_bytes=200)
    assert Roofline(machine).bounds(busy) == (10.0, 2.0)
    assert dict(Roofline(machine).predict([busy, starved]).site_s) == {"a": 10.0, "b": 20.0}
    assert Roofline(machine).predict([replace(busy, bits=8)]).latency_s == 2.5
    # Four-bit operands run on the eight-bit kernels.
    assert Roofline(machine).predict([replace(busy, bits=4)]).latency_s == 2.5
    # Sixteen bits fit only into the kernels for thirty-two, and so does what nothing is wide enough for.
    assert Roofline(machine).predict([replace(busy, bits=16)]).latency_s == 10.0
    assert Roofline(machine).predict([replace(busy, bits=64)]).latency_s == 10.0


def test_narrow_operands_may_run_on_wider_kernels_where_those_are_faster() -> None:
    machine = replace(host(), macs_per_s={32: 400.0, 8: 100.0}, bytes_per_s=1e9)
    assert Roofline(machine).predict([Workload("a", "conv2d", {}, 1000, 0, bits=8)]).latency_s == 2.5


def test_factor_launch_and_error_are_applied_to_every_call() -> None:
    machine = replace(host(), macs_per_s={32: 100.0}, bytes_per_s=10.0)
    work = Workload("a", "conv2d", {}, macs=1000, moved_bytes=20)
    prediction = Roofline(machine, factor=3.0, launch_s=0.5, error=0.1).predict([work, work])
    assert prediction.latency_s == 2 * (3.0 * 10.0 + 0.5)
    assert prediction.std_s == pytest.approx(0.1 * 61.0)
    assert Roofline(machine).predict([work]).std_s == 10.0  # a bound says nothing of how far above it the time is
