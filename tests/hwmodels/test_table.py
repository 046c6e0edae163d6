"""Tables of measured kernels, what is predicted between them, and what whole networks add: against known laws."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from math import isnan, log
from pathlib import Path

import numpy as np
import pytest

from planish.hwmodels import regression as regression_file
from planish.hwmodels.corrector import Corrector, fetched
from planish.hwmodels.device import host
from planish.hwmodels.held_out import held_out
from planish.hwmodels.kernel_database import KernelTime
from planish.hwmodels.quiet import Settled
from planish.hwmodels.regression import KernelRegression
from planish.hwmodels.relative_fit import log_error
from planish.hwmodels.table import TableModel, UnknownKernel
from planish.hwmodels.transfer import TransferModel
from planish.hwmodels.workload import Workload


def _work(c: int, o: int, pixels: int, site: str = "", threads: int = 1) -> Workload:
    macs = c * o * pixels
    return Workload(
        site, "conv2d", {"c": c, "o": o, "h": pixels}, macs, 4 * (c * o + pixels * (c + o)), 32, 4 * c * o, threads, "",
        macs / 8,
    )  # fmt: skip


def _seconds(work: Workload) -> float:
    """The law of an imaginary device: a nanosecond for 10 MACs, half a microsecond for the call."""
    return work.macs * 1e-10 + 0.5e-6


def _time(work: Workload, width: float = 0.02) -> KernelTime:
    seconds = _seconds(work)
    return KernelTime(work, Settled(seconds, seconds * (1 - width), seconds * (1 + width), 12, True))


def _noisy(noise: float, seed: int) -> dict[str, KernelTime]:
    """The grid's times, each off the law by so much."""
    rng = np.random.default_rng(seed)
    times = {}
    for work in GRID:
        seconds = _seconds(work) * float(np.exp(noise * rng.normal()))
        times[work.key()] = KernelTime(work, Settled(seconds, 0.98 * seconds, 1.02 * seconds, 12, True))
    return times


GRID = [_work(c, o, p) for c in (8, 16, 32, 64) for o in (8, 16, 32, 64) for p in (16, 64, 256)]
TIMES = {work.key(): _time(work) for work in GRID}


def test_known_kernels_are_summed_by_site() -> None:
    model = TableModel(host(), TIMES)
    network = [replace(GRID[0], site="a"), replace(GRID[5], site="b"), replace(GRID[9], site="a")]
    found = model.predict(network)
    assert found.latency_s == pytest.approx(sum(_seconds(work) for work in network))
    assert found.site_s == pytest.approx({"a": _seconds(GRID[0]) + _seconds(GRID[9]), "b": _seconds(GRID[5])})
    assert found.std_s > 0
    assert model.predict([]).latency_s == 0


def test_what_a_call_costs_is_the_site_s_that_calls() -> None:
    corrector = Corrector(call_s=2e-6, factor=0.9, byte_s=1e-11, error=0.0)
    network = [replace(GRID[3], site="a"), *[replace(GRID[0], site="b")] * 3]
    found = TableModel(host(), TIMES, corrector=corrector).predict(network)
    own = {site: 0.9 * _seconds(w) + 2e-6 + 1e-11 * w.weight_bytes for site, w in (("a", GRID[3]), ("b", GRID[0]))}
    assert found.site_s == pytest.approx({"a": own["a"], "b": 3 * own["b"]})
    assert found.latency_s == pytest.approx(own["a"] + 3 * own["b"])


def test_a_kernel_that_is_called_often_is_wrong_by_the_same_every_time() -> None:
    model = TableModel(host(), TIMES, corrector=Corrector(error=0.0))
    one, other = model.predict([GRID[3]]), model.predict([GRID[7]])
    assert model.predict([GRID[3]] * 9).std_s == pytest.approx(9 * one.std_s)
    assert model.predict([GRID[3], GRID[7]]).std_s == pytest.approx(float(np.hypot(one.std_s, other.std_s)))


def test_an_operator_that_was_never_measured_is_as_uncertain_as_a_device_that_nobody_has() -> None:
    regression = KernelRegression.fit(list(TIMES.values()))
    known, unknown = regression.spread([_work(24, 24, 64), replace(_work(24, 24, 64), op="attention")])
    assert known < 0.2
    assert unknown >= 0.5


def test_a_kernel_that_nothing_is_known_of_is_named() -> None:
    unknown = _work(7, 7, 7)
    with pytest.raises(UnknownKernel, match=r"1 kernels are not in the table of cpu, the first of them conv2d"):
        TableModel(host(), TIMES).predict([GRID[0], unknown])
    assert TableModel(host(), TIMES).unmeasured([GRID[0], unknown, replace(unknown, site="b")]) == [unknown]


def test_between_measured_kernels_the_regression_is_near_the_law_and_states_its_error() -> None:
    regression = KernelRegression.fit(list(TIMES.values()))
    unseen = [_work(c, o, p) for c in (12, 24, 48) for o in (12, 24, 48) for p in (32, 128)]
    errors = np.log(regression.predict(unseen) / [_seconds(work) for work in unseen])
    assert np.median(np.abs(errors)) < 0.15
    assert 0.2 < np.std(errors) / regression.error < 5
    assert len(regression.predict([])) == 0


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
def test_the_regression_is_as_good_as_its_times_and_takes_no_law_for_noise(noise: float) -> None:
    for seed in range(4):
        assert KernelRegression.fit(list(_noisy(noise, seed).values())).error < 0.02 + 1.5 * noise


def test_an_unknown_kernel_makes_a_prediction_less_certain() -> None:
    times = _noisy(0.05, seed=0)
    model = TableModel(host(), times, KernelRegression.fit(list(times.values())), Corrector(error=0.0))
    known, unknown = model.predict([GRID[20]]), model.predict([_work(24, 24, 64)])
    assert unknown.std_s / unknown.latency_s > 2 * known.std_s / known.latency_s


def test_more_work_of_the_same_shapes_never_takes_less() -> None:
    model = TableModel(host(), {}, KernelRegression.fit(list(TIMES.values())))
    rng = np.random.default_rng(0)
    for _ in range(30):
        c, o, pixels = (int(size) for size in rng.integers(1, 100, 3))
        work = _work(c, o, pixels)
        now = model.predict([work]).latency_s
        for more in (replace(work, macs=2 * work.macs), replace(work, moved_bytes=3 * work.moved_bytes)):
            assert model.predict([more]).latency_s >= now


def test_what_lies_far_from_what_was_measured_is_less_certain() -> None:
    regression = KernelRegression.fit(list(TIMES.values()))
    between, beyond = [_work(24, 24, 128), _work(48, 24, 96)], [_work(512, 512, 4096), _work(2, 300, 9)]
    assert regression.spread(between).max() < regression.spread(beyond).min()
    assert len(regression.spread([])) == 0


def test_the_error_is_that_of_kernels_predicted_from_the_others() -> None:
    times = list(TIMES.values())
    stated = KernelRegression.fit(times).error
    errors = []
    for place in range(0, len(times), 4):
        left = [time for number, time in enumerate(times) if number != place]
        work = times[place].workload
        errors.append(log(KernelRegression.fit(left).predict([work])[0] / times[place].time.median_s))
    assert 0.5 < log_error(np.exp(errors), np.ones(len(errors))) / stated < 2


def test_many_kernels_are_a_sample_and_the_same_seed_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression_file, "_MOST", 60)
    monkeypatch.setattr(regression_file, "_FOR_SCALES", 40)
    unseen = [_work(24, 24, 128), _work(12, 48, 64)]
    first, again, other = (KernelRegression.fit(list(TIMES.values()), seed).predict(unseen) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert first == pytest.approx([_seconds(work) for work in unseen], rel=0.3)


def test_the_number_of_threads_changes_no_bit() -> None:
    code = (
        "from tests.hwmodels.test_table import KernelRegression, _time, _work\n"
        "found = KernelRegression.fit([_time(_work(c, o, p)) for c in range(8, 72, 8) for o in range(8, 72, 8)"
        " for p in (16, 50, 256)])\n"
        "print([value.hex() for value in found.predict([_work(c, 24, 100) for c in range(20, 60)])])"
    )
    outputs = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_too_few_kernels_are_no_ground_for_a_regression() -> None:
    with pytest.raises(ValueError, match="19 measured kernels are too few"):
        KernelRegression.fit(list(TIMES.values())[:19])


def _networks(count: int, threads: int = 1) -> list[list[Workload]]:
    rng = np.random.default_rng(1)
    return [
        [replace(GRID[i], threads=threads if i % 2 else 1) for i in rng.integers(len(GRID), size=rng.integers(3, 30))]
        for _ in range(count)
    ]


def test_the_corrector_finds_what_calls_and_weights_cost() -> None:
    networks = _networks(40)
    sums = [sum(_seconds(work) for work in network) for network in networks]
    weights = [sum(work.weight_bytes for work in network) for network in networks]
    truth = [1.2 * s + 2e-6 * len(n) + 3e-11 * w for s, n, w in zip(sums, networks, weights, strict=True)]
    found = Corrector.fit(sums, networks, truth)
    errors = [found.apply(s, n) / t - 1 for s, n, t in zip(sums, networks, truth, strict=True)]
    assert np.abs(errors).max() < 0.03
    assert found.error < 0.05
    assert found.networks == 40


def test_the_corrector_states_the_noise_of_what_it_was_fitted_to() -> None:
    networks, rng = _networks(60), np.random.default_rng(2)
    sums = [sum(_seconds(work) for work in network) for network in networks]
    noisy = [s * float(np.exp(rng.normal(0, 0.1))) for s in sums]
    assert 0.07 < Corrector.fit(sums, networks, noisy).error < 0.14


def test_what_cores_fetch_from_each_other_is_learnt_where_calls_are_shared() -> None:
    networks = _networks(24, threads=2)
    sums = [sum(_seconds(work) for work in network) for network in networks]
    moved = [float(fetched(network).sum()) for network in networks]
    measured = [1.05 * s + 0.3e-6 * len(n) + 2e-10 * m for s, n, m in zip(sums, networks, moved, strict=True)]
    found = Corrector.fit(sums, networks, measured)
    assert found.byte_s == 0
    assert found.fetch_s == pytest.approx(2e-10, rel=0.15)
    for s, network, seconds in zip(sums, networks, measured, strict=True):
        assert found.apply(s, network) == pytest.approx(seconds, rel=0.02)


def test_no_coefficient_is_negative_so_more_calls_never_take_less() -> None:
    networks = _networks(20)
    sums = [sum(_seconds(work) for work in network) for network in networks]
    # A law that rewards calls: the fit must not follow it below zero.
    found = Corrector.fit(sums, networks, [s / (1 + len(n)) for s, n in zip(sums, networks, strict=True)])
    assert min(found.call_s, found.factor, found.byte_s, found.fetch_s) >= 0


def test_too_few_networks_are_told() -> None:
    with pytest.raises(ValueError, match="at least 6 networks"):
        Corrector.fit([1.0], [[GRID[0]]], [1.0])


def test_another_thread_count_is_learnt_from_a_few_probes() -> None:
    source = TableModel(host(), TIMES, KernelRegression.fit(list(TIMES.values())))
    networks = _networks(30, threads=2)

    def law(network: list[Workload]) -> float:
        own = sum(_seconds(w) * (0.55 if w.threads > 1 else 1.0) for w in network)
        return own + 2e-10 * float(fetched(network).sum())

    model = TransferModel.fit(host(), source, networks[:20], [law(network) for network in networks[:20]])
    errors = [log(model.predict(network).latency_s / law(network)) for network in networks[20:]]
    assert np.abs(errors).max() < 0.1
    assert model.trusted
    with pytest.raises(ValueError, match="8 probes"):
        TransferModel.fit(host(), source, networks[:3], [1.0] * 3)


def test_probes_that_follow_no_law_are_not_trusted() -> None:
    source = TableModel(host(), TIMES, KernelRegression.fit(list(TIMES.values())))
    networks, rng = _networks(20, threads=2), np.random.default_rng(3)
    wild = [sum(map(_seconds, network)) * float(np.exp(rng.normal(0, 1))) for network in networks]
    assert not TransferModel.fit(host(), source, networks, wild).trusted


def test_held_out_errors_are_those_of_the_definition() -> None:
    found = held_out([1.0, 2.08, 3.27, 3.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found.count == 6
    assert (found.within_5, found.within_10) == pytest.approx((4 / 6, 5 / 6))
    assert found.median_error == pytest.approx(0.02)
    assert found.spearman == pytest.approx(1 - 6 * 2 / (6 * 35))  # one swap of neighbours (Spearman 1904)
    assert isnan(found.spearman_fast_third)
    with pytest.raises(ValueError, match="as many of each"):
        held_out([1.0], [])


def test_the_error_is_stated_of_the_own_networks_however_few_they_are() -> None:
    networks = _networks(37)
    sums = [sum(_seconds(work) for work in network) for network in networks]
    own = [number >= 32 for number in range(37)]
    measured = [s * (1.4 if mine else 1.0) for s, mine in zip(sums, own, strict=True)]
    found = Corrector.fit(sums, networks, measured, own)
    assert found.held_out is not None
    assert (found.held_out.count, found.held_out.within_10) == (5, 0.0)
    assert found.error > 0.2
    # Few that fit by chance do not make it surer than all are.
    lucky = Corrector.fit(sums, networks, measured, [number < 3 for number in range(37)])
    assert lucky.held_out is not None
    assert lucky.held_out.count == 3
    assert lucky.error == pytest.approx(Corrector.fit(sums, networks, measured).error)
    none = Corrector.fit(sums, networks, measured, [False] * 37)
    assert (none.held_out, none.error) == (None, lucky.error)


def test_what_met_no_quiet_machine_is_less_certain_than_its_runs_agree() -> None:
    quiet = TIMES[GRID[5].key()]
    loud = replace(quiet, time=replace(quiet.time, quiet=False))
    corrector = Corrector(error=0.0)
    known = TableModel(host(), {GRID[5].key(): quiet}, corrector=corrector).predict([GRID[5]])
    found = TableModel(host(), {GRID[5].key(): loud}, corrector=corrector).predict([GRID[5]])
    assert found.latency_s == known.latency_s
    assert found.std_s == pytest.approx(float(np.hypot(known.std_s, 0.1 * known.latency_s)))


def test_what_a_carried_over_call_takes_does_not_go_by_what_else_is_called() -> None:
    corrector = Corrector(call_s=1e-6, factor=0.9, error=0.05)
    source = TableModel(host(), TIMES, KernelRegression.fit(list(TIMES.values())), corrector)
    networks = _networks(20, threads=2)
    model = TransferModel.fit(host(), source, networks, [source.predict(network).latency_s for network in networks])
    small, large = replace(GRID[0], site="small"), replace(GRID[-1], site="large")
    together = model.predict([small, large])
    assert together.site_s["small"] == pytest.approx(model.predict([small]).latency_s)
    assert together.latency_s == pytest.approx(sum(together.site_s.values()))


def _stored(k: int, o: int, bits: int) -> Workload:
    """A dense layer of float32 inputs whose weights are stored with fewer bits; the compiler counts the same cycles."""
    size = k * o * bits // 8
    form = f"DenseSpec(m=1, k={k}, o={o}, steps=(), nibbles=False, weight_bits={bits})"
    return Workload("", "linear", {"m": 1, "k": k, "o": o}, k * o, size + 4 * (k + o), 32, size, 1, form, k * o / 16)


def test_what_reading_few_bits_costs_is_learned_apart_from_other_widths() -> None:
    """Unpacking 4 bits takes longer than reading 8: no count of bytes says so, and no size."""
    each = {32: 1.0e-11, 8: 1.1e-11, 4: 2.0e-11}
    measured = [
        (_stored(k, o, bits), each[bits] * k * o + 2e-7)
        for k in (64, 144, 288, 320, 640)
        for o in (144, 288, 1000)
        for bits in each
        if bits == 32 or k < 400
    ]
    times = [KernelTime(work, Settled(s, s, s, 12, True)) for work, s in measured]
    regression = KernelRegression.fit(times)
    for bits in (4, 8):
        [found] = regression.predict([_stored(640, 1000, bits)])
        assert found == pytest.approx(each[bits] * 640_000 + 2e-7, rel=0.15)
