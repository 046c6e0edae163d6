"""A latency table of a small model's space: built, kept, used again, and refused where it would be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from planish.compilers import kernel_timer
from planish.compilers.compiler import CompileError
from planish.compilers.kernel_timer import Timed
from planish.compilers.kernel_times import database_of
from planish.compilers.remote import DeviceLost
from planish.hwmodels.cycles import CountedCycles
from planish.hwmodels.kernel_database import KernelDatabase, KernelTime, NetworkTime
from planish.hwmodels.load import BusyMachine
from planish.hwmodels.quiet import Samples, Settled
from planish.hwmodels.regression import KernelRegression
from planish.hwmodels.table import TableModel
from planish.hwmodels.transfer import TransferModel
from planish.hwmodels.workload import Workload
from planish.search import latency_table, table_measuring, transferred
from planish.search.config import load_spec
from planish.search.data import Data, Split
from planish.search.errors import UserError
from planish.search.evaluate import Evaluator, Job
from planish.search.fitted import fitted
from planish.search.latency_table import (
    LatencyTable,
    build_table,
    plan_of,
    predict,
    refuse_disturbed,
    table_candidates,
)
from planish.search.library import latency_model
from planish.search.progress import Progress
from planish.search.table_measuring import Networks, TableLimits, TableMeasuring, by_error
from planish.search.tasks import Task

pytestmark = pytest.mark.tvm

SMALL = TableLimits(candidates=11, least=9, build_s=60.0, kernels=26, kernel_s=0.5, network_s=0.5)


@pytest.fixture(autouse=True)
def machine_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who else uses the machine that the tests run on is not what they are about."""
    monkeypatch.setattr(latency_table, "wait_for_quiet", lambda threads: None)
    monkeypatch.setattr(latency_table, "refuse_disturbed", lambda quiet, name, slower: None)
    monkeypatch.setattr(table_measuring, "refuse_loaded", lambda watch, device: None)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    split = Split(torch.randn(8, 3, 12, 12), torch.arange(8) % 4)
    data = Data(split, split, split, ("a", "b", "c", "d"))
    return Evaluator(load_spec(None, {"model": "own", "data": "own"}), Task(model, data))


@pytest.fixture(scope="module")
def database(evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> KernelDatabase:
    return database_of(evaluator.devices["cpu"], tmp_path_factory.mktemp("times") / "times.sqlite")


@pytest.fixture(scope="module")
def table(evaluator: Evaluator, database: KernelDatabase) -> LatencyTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_table, "wait_for_quiet", lambda threads: None)
        patch.setattr(latency_table, "refuse_disturbed", lambda quiet, name, slower: None)
        patch.setattr(table_measuring, "refuse_loaded", lambda watch, device: None)
        return build_table(evaluator, "cpu", database, Progress(None), limits=SMALL)


def test_every_candidate_of_the_space_can_be_predicted(table: LatencyTable, evaluator: Evaluator) -> None:
    space, rng = evaluator.proposal.space, np.random.default_rng(7)
    for candidate in (space.original(), *(space.sample(rng) for _ in range(5))):
        found = predict(table, evaluator, "cpu", candidate)
        assert 0 < found.latency_s < 1
        assert found.std_s > 0
        assert sum(found.site_s.values()) == pytest.approx(found.latency_s)


def test_the_table_states_what_it_measured_and_how_wrong_it_is(table: LatencyTable, database: KernelDatabase) -> None:
    assert table.measured == len(database.times()) >= 15
    assert table.known == 0
    assert table.failed == {}
    assert table.held_out is not None
    assert table.held_out.count >= 7
    assert isinstance(table.model, TableModel)
    assert table.model.corrector.networks == table.held_out.count
    original = table.model.predict(list(database.networks()[0].workloads))
    assert original.std_s >= 0.99 * table.error * original.latency_s


def test_a_second_table_measures_nothing_twice(
    table: LatencyTable, evaluator: Evaluator, database: KernelDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {key: time for key, time in database.times().items() if time.time.quiet}
    known = len(database.times())
    asked: list[set[str]] = []
    real = TableMeasuring.kernels

    def noted(self: TableMeasuring, wanted: list[str], *rest: Any) -> None:
        asked.append(set(wanted))
        real(self, wanted, *rest)

    monkeypatch.setattr(TableMeasuring, "kernels", noted)
    again = build_table(evaluator, "cpu", database, Progress(None), limits=SMALL)
    assert asked
    assert not any(wanted & set(before) for wanted in asked)
    assert again.known == known
    assert {key: time for key, time in database.times().items() if key in before} == before


def test_what_met_no_quiet_machine_is_timed_again_the_next_time_and_once(
    table: LatencyTable, evaluator: Evaluator, database: KernelDatabase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = database_of(evaluator.devices["cpu"], tmp_path / "times.sqlite")
    disturbed = [replace(time, time=replace(time.time, quiet=False)) for time in database.times().values()]
    own.add([*disturbed, *database.networks()], {})
    asked: list[str] = []

    def noted(self: TableMeasuring, wanted: list[str], *rest: Any) -> None:
        asked.extend(wanted)
        self.timed.update(wanted)

    monkeypatch.setattr(TableMeasuring, "kernels", noted)
    monkeypatch.setattr(TableMeasuring, "networks", lambda self, *rest: self.database.networks())
    found = build_table(evaluator, "cpu", own, Progress(None), limits=SMALL)
    original = plan_of(evaluator, "cpu", evaluator.proposal.space.original())
    assert original.kernels.keys() <= set(asked)
    assert len(asked) == len(set(asked))
    # None of them met one again, and who reads the table is told.
    assert [note for note in found.notes if "met no quiet machine on cpu, so that each" in note]


@pytest.mark.parametrize("total_s", [0.0, 600.0])
def test_time_that_is_left_goes_to_what_met_no_quiet_machine(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total_s: float
) -> None:
    own = database_of(evaluator.devices["cpu"], tmp_path / "times.sqlite")
    asked: list[list[str]] = []
    limits: list[float] = []

    def timed(self: TableMeasuring, wanted: list[str], works: Any, reference: Any, limit_s: float) -> None:
        asked.append(list(wanted))
        # Every third one is disturbed the first time.
        new = {
            key: KernelTime(works[key].workload, Settled(1e-5, 1e-5, 1e-5, 12, place % 3 > 0 or len(asked) > 2))
            for place, key in enumerate(wanted)
        }
        self.known |= new
        self.timed |= new.keys()

    def measured(self: TableMeasuring, *given: Any) -> list[NetworkTime]:
        limits.append(given[-1])
        return []

    monkeypatch.setattr(TableMeasuring, "kernels", timed)
    monkeypatch.setattr(TableMeasuring, "networks", measured)
    build_table(evaluator, "cpu", own, Progress(None), limits=replace(SMALL, kernels=40, total_s=total_s))
    disturbed = {key for part in asked[:2] for key in part[::3]}
    if total_s:
        assert set(asked[2]) == disturbed
        assert 0 < limits[0] < total_s
    else:
        assert len(asked) == 2
        assert limits[0] <= 0


def test_the_error_is_stated_of_this_space_s_networks(
    table: LatencyTable, evaluator: Evaluator, database: KernelDatabase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Another model's networks, twice as slow as their kernels: no part of what is stated."""
    own = database_of(evaluator.devices["cpu"], tmp_path / "times.sqlite")
    ours = [replace(network, time=replace(network.time, quiet=True)) for network in database.networks()]
    own.add([*database.times().values(), *ours], {})
    kernels = list(database.times().values())
    rng = np.random.default_rng(0)
    others = []
    for _ in range(12):
        works = tuple(kernels[int(place)].workload for place in rng.choice(len(kernels), 5))
        s = 2.0 * sum(database.times()[work.key()].time.median_s for work in works)
        others.append(NetworkTime(works, Settled(s, 0.99 * s, 1.01 * s, 20, True)))
    own.add(others, {})
    seen: list[list[bool]] = []
    monkeypatch.setattr(latency_table, "refuse_disturbed", lambda quiet, name, slower: seen.append(list(quiet)))
    monkeypatch.setattr(TableMeasuring, "kernels", lambda self, *rest: None)
    monkeypatch.setattr(TableMeasuring, "networks", lambda self, *rest: self.database.networks())
    found = build_table(evaluator, "cpu", own, Progress(None), limits=SMALL)
    assert len(own.networks()) == len(ours) + 12
    assert seen == [[True] * len(ours)]
    assert found.held_out is not None
    assert found.held_out.count == len(ours)


@pytest.fixture
def two_threads(evaluator: Evaluator) -> Evaluator:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("this machine has one core")
    spec = load_spec(None, {"model": "own", "data": "own", "device": "cpu?threads=2"})
    return Evaluator(spec, evaluator.task)


@pytest.mark.parametrize("follows", [True, False])
def test_another_number_of_threads_carries_the_table_over_if_networks_say_that_it_can(
    table: LatencyTable, two_threads: Evaluator, database: KernelDatabase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, follows: bool,
) -> None:  # fmt: skip
    """Times of two threads are made up: by a law that a few networks show, or by none."""
    monkeypatch.setattr(transferred, "ENOUGH", 15)
    monkeypatch.setattr(latency_table, "_KNOWN", 10**9)
    for limits in ("FIRST", "PROBES"):
        monkeypatch.setattr(latency_table, limits, replace(SMALL, candidates=10))
    source = fitted(table.model.device, database.times(), database.networks())
    label = next(iter(two_threads.devices))
    own = database_of(two_threads.devices[label], tmp_path / "times.sqlite")
    own.merge(database.path)
    rng = np.random.default_rng(0)

    def seconds(works: tuple[Workload, ...]) -> float:
        alone = source.predict([replace(work, threads=1) for work in works]).latency_s
        return 0.8 * alone if follows else alone * float(np.exp(rng.normal(0, 1)))

    def measured(self: TableMeasuring, *given: Any) -> list[NetworkTime]:
        times = [(plan.calls, seconds(plan.calls)) for plan in given[2].plans.values()]
        return [NetworkTime(tuple(calls), Settled(s, 0.99 * s, 1.01 * s, 20, True)) for calls, s in times]

    monkeypatch.setattr(TableMeasuring, "networks", measured)
    asked: list[int] = []
    monkeypatch.setattr(TableMeasuring, "kernels", lambda self, wanted, *rest: asked.append(len(wanted)))
    found = build_table(two_threads, label, own, Progress(None))
    if follows:
        assert isinstance(found.model, TransferModel)
        assert found.source == "the table of 1 thread"
        assert found.held_out == found.model.probes
        assert len(asked) == 1  # the reference alone
        original = plan_of(two_threads, label, two_threads.proposal.space.original()).calls
        assert predict(found, two_threads, label, two_threads.proposal.space.original()).latency_s == pytest.approx(
            seconds(tuple(original)), rel=0.1
        )
    else:
        assert isinstance(found.model, TableModel)
        assert found.source == ""
        assert any("is not carried over: " in note for note in found.notes)
        assert len(asked) > 1


def test_a_search_predicts_two_threads_from_what_is_known_of_one(
    table: LatencyTable, two_threads: Evaluator, database: KernelDatabase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    label = next(iter(two_threads.devices))
    two_threads.times = tmp_path / "times.sqlite"
    own = database_of(two_threads.devices[label], two_threads.times)
    own.merge(database.path)
    assert isinstance(latency_model(two_threads, label), CountedCycles)
    monkeypatch.setattr(transferred, "ENOUGH", 15)
    assert isinstance(latency_model(two_threads, label), CountedCycles)  # no network of two threads was measured
    space, rng = two_threads.proposal.space, np.random.default_rng(3)
    source = fitted(table.model.device, database.times(), database.networks())
    networks = []
    for candidate in (space.original(), *(space.sample(rng) for _ in range(10))):
        calls = tuple(plan_of(two_threads, label, candidate).calls)
        s = 0.7 * source.predict([replace(work, threads=1) for work in calls]).latency_s
        networks.append(NetworkTime(calls, Settled(s, 0.99 * s, 1.01 * s, 20, True)))
    own.add(networks, {})
    model = latency_model(two_threads, label)
    assert isinstance(model, TransferModel)
    assert model.trusted


def test_no_candidate_is_begun_when_time_is_up_but_the_least(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def compiled(evaluator: Evaluator, label: str, program: object, folder: Path) -> Path:
        built.append(folder)
        return folder

    monkeypatch.setattr(table_measuring, "compiled", compiled)
    database = database_of(evaluator.devices["cpu"], tmp_path / "times.sqlite")
    candidates = table_candidates(evaluator.proposal.space, 8)

    def build(networks: Networks, **limits: Any) -> int:
        measuring = TableMeasuring(evaluator.devices["cpu"], database, replace(SMALL, **limits), Progress(None), {})
        measuring.build(evaluator, "cpu", candidates, networks, tmp_path)
        return len(networks.plans)

    networks = Networks()
    assert build(networks, candidates=8, least=3, build_s=-1.0) == 3
    assert list(networks.artifacts) == [candidate.key() for candidate in candidates[:3]]
    assert build(networks, candidates=5, least=3, build_s=600.0) == 5
    assert built == [tmp_path / candidate.key() for candidate in candidates[:5]]
    # What was compiled before is not compiled again, and what was timed on a quiet machine is planned alone.
    key, other = candidates[0].key(), candidates[1].key()
    assert build(given := Networks(made={other: (networks.plans[other], tmp_path / "made")}), candidates=2) == 2
    assert given.artifacts == {key: tmp_path / key, other: tmp_path / "made"}
    database.add([NetworkTime(networks.plans[key].calls, Settled(1e-3, 1e-3, 1e-3, 9, True))], {})
    again = Networks()
    assert build(again, candidates=2, least=2, build_s=600.0) == 2
    assert list(again.artifacts) == [candidates[1].key()]


def test_a_candidate_that_cannot_be_built_is_told_and_the_original_must_be(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = table_candidates(evaluator.proposal.space, 4)
    refused = {candidates[2].key()}

    def compiled(evaluator: Evaluator, label: str, program: object, folder: Path) -> Path:
        if folder.name in refused:
            raise CompileError("no way")
        return folder

    monkeypatch.setattr(table_measuring, "compiled", compiled)
    database = database_of(evaluator.devices["cpu"], tmp_path / "times.sqlite")
    measuring = TableMeasuring(evaluator.devices["cpu"], database, replace(SMALL, candidates=4), Progress(None), {})
    networks = Networks()
    measuring.build(evaluator, "cpu", candidates, networks, tmp_path)
    assert measuring.failed == {f"network {candidates[2].key()}": "no way"}
    assert len(networks.artifacts) == 3
    refused.add(candidates[0].key())
    with pytest.raises(CompileError, match="no way"):
        measuring.build(evaluator, "cpu", candidates, Networks(), tmp_path)


def test_what_is_uncertain_and_takes_time_is_measured_next() -> None:
    def work(o: int) -> Workload:
        return Workload("", "conv2d", {"o": o}, 1000 * o, 100, 32, 10, 1, str(o), 1000.0 * o)

    class Regression:
        def predict(self, works: list[Workload]) -> Any:
            return np.array([w.cycles * 1e-9 for w in works])

        def spread(self, works: list[Workload]) -> Any:
            return np.array([{1: 0.5, 2: 0.1, 5: 0.2}[w.shapes["o"]] for w in works])

    plans: Any = [SimpleNamespace(calls=(work(1), work(2), work(5), work(9)))]
    keys = [work(o).key() for o in (2, 1, 5)]
    # 1 x 0.5, 2 x 0.1 and 5 x 0.2; once in one plan, thrice in another.
    assert by_error(plans, keys, cast("KernelRegression", Regression())) == [keys[2], keys[1], keys[0]]
    plans.append(SimpleNamespace(calls=(work(1),) * 3))
    assert by_error(plans, keys, cast("KernelRegression", Regression())) == [keys[1], keys[2], keys[0]]


def test_times_that_cannot_be_kept_are_used_all_the_same(evaluator: Evaluator, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    database = database_of(evaluator.devices["cpu"], tmp_path / "file" / "times.sqlite")
    found = build_table(evaluator, "cpu", database, Progress(None), limits=replace(SMALL, candidates=4))
    assert found.measured >= 15
    # A machine that others use may have its own note.
    (note,) = [note for note in found.notes if "met no quiet machine" not in note]
    assert "times are not kept" in note


def test_a_busy_machine_gives_no_table_and_keeps_nothing(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(watch: object, device: object) -> None:
        raise BusyMachine("busy")

    monkeypatch.setattr(table_measuring, "refuse_loaded", busy)
    database = database_of(evaluator.devices["cpu"], tmp_path / "times.sqlite")
    with pytest.raises(BusyMachine):
        build_table(evaluator, "cpu", database, Progress(None), limits=replace(SMALL, candidates=2))
    assert database.times() == {}


def test_a_device_that_is_lost_keeps_what_was_timed_and_says_so(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(works: dict[str, Any], *rest: Any, **options: Any) -> Timed:
        samples = {key: Samples((1e-5,) * 12, (2e-5,) * 12) for key in list(works)[:3]}
        return Timed(samples, 2e-5, {}, DeviceLost("device cpu is lost: no route"))

    monkeypatch.setattr(kernel_timer, "time_kernels", lost)
    database = database_of(evaluator.devices["cpu"], tmp_path / "times.sqlite")
    with pytest.raises(UserError, match="device cpu is lost: no route; what was timed is kept"):
        build_table(evaluator, "cpu", database, Progress(None), limits=replace(SMALL, candidates=2))
    assert len(database.times()) == 3


def test_a_table_of_networks_that_met_no_quiet_machine_is_refused_and_what_met_one_is_kept(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_table, "refuse_disturbed", refuse_disturbed)
    database = database_of(evaluator.devices["cpu"], tmp_path / "times.sqlite")
    few = replace(SMALL, candidates=4)

    def measured(self: TableMeasuring, *given: Any) -> list[NetworkTime]:
        times = [Settled(1e-4, 9e-5, 2e-4, 18, number < 1) for number in range(4)]
        found = [NetworkTime(p.calls, t) for p, t in zip(given[2].plans.values(), times, strict=True)]
        self.database.add(found, {})
        return found

    monkeypatch.setattr(TableMeasuring, "networks", measured)
    with pytest.raises(BusyMachine, match=r"^only 1 of 4 networks met a quiet machine on cpu; .*--no-table"):
        build_table(evaluator, "cpu", database, Progress(None), limits=few)
    assert len(database.times()) >= 15
    assert sum(network.time.quiet for network in database.networks()) == 1


def test_the_plans_working_memory_is_the_artifacts(evaluator: Evaluator, tmp_path: Path) -> None:
    from planish.compilers.manifest import read

    space, rng = evaluator.proposal.space, np.random.default_rng(3)
    for number in range(3):
        candidate = space.sample(rng)
        folder = table_measuring.compiled_skeleton(evaluator, "cpu", candidate, tmp_path / str(number))
        assert plan_of(evaluator, "cpu", candidate).working_bytes == read(folder).working_bytes


def test_energy_is_modelled_where_it_is_asked_for(evaluator: Evaluator, tmp_path: Path) -> None:
    from planish.hwmodels.energy import energy_j

    space = evaluator.proposal.space
    asked = Evaluator(load_spec(None, {"model": "own", "data": "own", "budget": ["energy<=0.5x"]}), evaluator.task)
    strongest = space.decode([len(choice.options) - 1 for choice in space.choices])
    found: list[float] = []
    for number, candidate in enumerate((space.original(), strongest)):
        job = Job(number, candidate, 0, tmp_path / str(number))
        metrics = asked.compile(asked.build(candidate), job, "artifact")
        found.append(float(str(metrics["energy_j"])))
        assert found[-1] == pytest.approx(energy_j(plan_of(asked, "cpu", candidate).calls), rel=0.05)
    assert found[1] < found[0]
    unasked = Job(2, space.original(), 0, tmp_path / "unasked")
    assert "energy_j" not in evaluator.compile(evaluator.build(space.original()), unasked, "artifact")


@pytest.fixture
def planish(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    import os

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PLANISH_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "planish.search", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def test_devices_shows_exports_and_imports_the_times(
    table: LatencyTable,
    database: KernelDatabase,
    planish: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    assert "no kernel was measured yet" in planish("devices", "--table").stdout
    assert json.loads(planish("devices", "--import", str(database.path), "--json").stdout) == {
        "imported": len(database.times())
    }
    (row,) = json.loads(planish("devices", "--table", "--json").stdout)
    assert (row["name"], row["kernels"], row["current"]) == ("cpu", len(database.times()), True)
    out = tmp_path / "out.sqlite"
    assert f"{len(database.times())} times exported" in planish("devices", "--export", str(out)).stdout
    again = planish("devices", "--export", str(out))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists" in again.stderr


def test_a_damaged_database_is_a_mistake_of_one_line(
    planish: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernel_times.sqlite").write_bytes(b"not a database " * 1000)
    done = planish("devices", "--table")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "PLANISH_CACHE" in done.stderr
