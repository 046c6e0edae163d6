"""What a table's measurements leave behind where something is in their way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planish.compilers import kernel_timer, network_timer, reference_timer
from planish.compilers.compiler import RunError
from planish.compilers.kernel_timer import Timed
from planish.compilers.network_timer import time_networks
from planish.compilers.remote import DeviceLost
from planish.compilers.runner import ChildResult
from planish.hwmodels.device import host, parse_device
from planish.hwmodels.kernel_database import KernelDatabase, KernelTime, NetworkTime
from planish.hwmodels.load import BusyMachine
from planish.hwmodels.quiet import Samples, Settled, settled
from planish.hwmodels.workload import Workload
from planish.search import table_measuring
from planish.search.errors import UserError
from planish.search.latency_table import refuse_disturbed
from planish.search.progress import Progress
from planish.search.table_measuring import Networks, TableLimits, TableMeasuring

LIMITS = TableLimits(candidates=1, least=1, build_s=1.0, kernels=4, kernel_s=1.0, network_s=1.0)
WORK = Workload("", "dense", {"m": 1, "k": 4}, 16, 64, 32, 64, 1, "", 4.0)
REFERENCE: Any = SimpleNamespace(kernels={"reference": SimpleNamespace(workload=WORK)})
QUIET = Samples((1e-4,) * 18, (3e-5,) * 18)


@pytest.fixture
def measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TableMeasuring:
    monkeypatch.setattr(table_measuring, "refuse_loaded", lambda watch, device: None)
    manifest = SimpleNamespace(kernels=[("reference", "")])
    reference = SimpleNamespace(path=tmp_path, manifest=manifest)
    monkeypatch.setattr(table_measuring, "compiled_reference", lambda evaluator, label, folder: reference)
    database = KernelDatabase(tmp_path / "times.sqlite", "device", "v1")
    return TableMeasuring(host(), database, LIMITS, Progress(None), {})


def planned() -> Networks:
    plan: Any = SimpleNamespace(calls=(WORK,))
    return Networks(plans={"one": plan}, artifacts={"one": Path("one")})


def networks(measuring: TableMeasuring, given: Networks) -> list[Any]:
    evaluator: Any = None
    return measuring.networks(evaluator, "cpu", given, Path("unused"), REFERENCE)


def test_a_network_that_cannot_be_kept_is_known_for_the_rest_of_the_profile(
    measuring: TableMeasuring, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    measuring.database = KernelDatabase(tmp_path / "file" / "times.sqlite", "device", "v1")
    monkeypatch.setattr(network_timer, "time_networks", lambda *given, **keys: Timed({"one": QUIET}, 3e-5, {}))
    [found] = networks(measuring, planned())
    assert found.time.median_s == pytest.approx(1e-4)
    assert networks(measuring, Networks()) == [found]
    assert "times are not kept" in measuring.notes[0]


def test_earlier_times_that_a_faster_reference_questions_are_measured_again(
    measuring: TableMeasuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(WORK, shapes={"m": 1, "k": 8})
    name = f"kernel {WORK.key()}"
    measuring.database.add([KernelTime(other, Settled(3e-6, 3e-6, 3e-6, 12, True))], {name: 4.5e-5})
    measuring.known = measuring.database.times()
    assert not measuring.asks(other.key())
    monkeypatch.setattr(kernel_timer, "time_kernels", lambda *given, **keys: Timed({WORK.key(): QUIET}, 3e-5, {}))
    work: Any = SimpleNamespace(workload=WORK)
    plan: Any = SimpleNamespace(kernels={WORK.key(): work})
    measuring.kernels([WORK.key()], {WORK.key(): work}, plan, 1.0)
    assert measuring.asks(other.key())
    assert measuring.known[other.key()].time.median_s == pytest.approx(2e-6)
    assert not measuring.asks(WORK.key())
    assert "1 earlier times were taken while cpu was slower" in measuring.notes[0]


def test_a_reference_that_fails_after_some_rounds_costs_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [0]

    def child(artifacts: Mapping[str, Path], *given: Any, **keys: Any) -> ChildResult:
        rounds[0] += 1
        if rounds[0] > 1:
            raise RunError("artifact 'reference' crashed with signal 9", "reference", crashed=True)
        return ChildResult({n: [1.0] * 3 for n in artifacts}, {}, {}, {n: [9.0, 1.0, 9.0] for n in artifacts}, {})

    monkeypatch.setattr(network_timer, "run_child", child)
    found = time_networks({"one": Path("one")}, Path("reference"), host(), limit_s=60.0)
    assert found.samples["one"].run_s == (1.0,) * 3
    assert isinstance(found.lost, RunError)
    assert not isinstance(found.lost, DeviceLost)


def test_what_ended_it_is_a_line_and_what_was_timed_is_kept(
    measuring: TableMeasuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Timed({"one": QUIET}, 3e-5, {}, RunError("artifact 'reference' crashed", "reference"))
    monkeypatch.setattr(network_timer, "time_networks", lambda *given, **keys: ended)
    with pytest.raises(UserError, match=r"crashed; what was timed is kept: give the same command again"):
        networks(measuring, planned())
    assert len(measuring.database.networks()) == 1


def test_a_board_that_is_gone_is_lost_and_one_that_is_slow_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.compilers import remote

    board = parse_device("rpc://127.0.0.1:9/cpu")
    assert "nothing answers at 127.0.0.1:9" in str(remote.gone(board))
    assert remote.gone(host()) is None
    monkeypatch.setattr(remote, "unanswered", lambda device: None)
    assert remote.gone(board) is None


def test_what_networks_are_timed_beside_is_compiled_once(
    measuring: TableMeasuring, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A table that is not carried over is followed by a whole one, in the same folder."""
    made: list[Path] = []

    def compiled(evaluator: object, label: str, folder: Path) -> Any:
        folder.mkdir()  # as the compiler: not twice
        made.append(folder)
        return SimpleNamespace(path=folder, manifest=SimpleNamespace(kernels=[("reference", "")]))

    monkeypatch.setattr(table_measuring, "compiled_reference", compiled)
    monkeypatch.setattr(network_timer, "time_networks", lambda *given, **keys: Timed({"one": QUIET}, 3e-5, {}))
    for _ in range(2):
        measuring.networks(None, "cpu", planned(), tmp_path, REFERENCE)  # type: ignore[arg-type]
    assert made == [tmp_path / "reference"]


@pytest.mark.parametrize("known", [True, False])
def test_a_new_device_s_quiet_networks_are_told_by_its_quiet_kernels(
    measuring: TableMeasuring, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """With more threads than one a network takes longer than its kernels' sum: measured, not added up."""
    given: list[float | None] = []

    def time_networks(*_: object, known_reference_s: float | None, **__: object) -> Timed:
        given.append(known_reference_s)
        return Timed({"one": QUIET}, 3e-5, {})

    asked: list[tuple[object, ...]] = []

    def quiet_network_s(*arguments: object) -> tuple[float, bool]:
        asked.append(arguments)
        return 2.9e-5, True

    monkeypatch.setattr(network_timer, "time_networks", time_networks)
    monkeypatch.setattr(reference_timer, "quiet_network_s", quiet_network_s)
    if known:
        measuring.database.add([KernelTime(WORK, settled(QUIET, 3e-5))], {f"kernel {WORK.key()}": 2e-5})
    networks(measuring, planned())
    networks(measuring, planned())  # by then the database knows what the reference takes
    assert given == [2.9e-5 if known else None, 3e-5]
    assert [one[2] for one in asked] == ([2e-5] if known else [])


def test_a_device_that_is_lost_while_its_reference_is_timed_keeps_what_was_timed(
    measuring: TableMeasuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> float:
        raise DeviceLost("device board is lost: no answer")

    monkeypatch.setattr(reference_timer, "quiet_network_s", lost)
    measuring.database.add([KernelTime(WORK, settled(QUIET, 3e-5))], {f"kernel {WORK.key()}": 2e-5})
    with pytest.raises(UserError, match=r"board is lost: no answer; what was timed is kept: once .* give the same"):
        networks(measuring, planned())


def test_a_machine_that_is_slower_for_good_is_told_what_to_move(
    measuring: TableMeasuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Samples((1.3e-4,) * 18, (3.9e-5,) * 18)
    monkeypatch.setattr(network_timer, "time_networks", lambda *given, **keys: Timed({"one": slow}, 3e-5, {}))
    measuring.database.add([NetworkTime((WORK,), settled(QUIET, 3e-5))], {"network reference": 3e-5})
    networks(measuring, planned())
    assert "takes 1.30 times as long as when its times were first measured" in measuring.slower
    assert f"move {measuring.database.path} away" in measuring.slower
    with pytest.raises(BusyMachine, match=r"0 of 9 networks .* 1\.30 times as long .* move .*times\.sqlite away$"):
        refuse_disturbed([False] * 9, "cpu", measuring.slower)


NAMES = tuple("abcdefgh")


def test_who_is_named_in_a_crash_fails_only_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with little memory: five in one process are too many, and whoever runs then is named."""
    sizes: list[int] = []

    def child(artifacts: Mapping[str, Path], *given: Any, **keys: Any) -> ChildResult:
        sizes.append(len(artifacts))
        if len(artifacts) > 5:
            raise RunError(
                "artifact 'a' crashed with signal 9", "a" if len(artifacts) > 8 else "reference", crashed=True
            )
        if "c" in artifacts:
            raise RunError("artifact 'c' crashed with signal 11", "c", crashed=True)
        return ChildResult({name: [1.0] * 3 for name in artifacts}, {}, {}, {name: [1.0] * 3 for name in artifacts})

    monkeypatch.setattr(network_timer, "run_child", child)
    found = time_networks({name: Path(name) for name in NAMES}, Path("reference"), host(), rounds=1)
    assert set(found.samples) == set(NAMES) - {"c"}
    assert found.failed == {"c": "artifact 'c' crashed with signal 11"}
    assert found.lost is None
    assert max(sizes) == 9
    assert min(sizes) == 2


def test_a_network_that_spoils_the_reference_beside_it_is_left_out_and_a_broken_reference_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = False

    def child(artifacts: Mapping[str, Path], *given: Any, **keys: Any) -> ChildResult:
        if broken or "c" in artifacts:
            raise RunError("artifact 'reference': outputs differ", "reference")
        return ChildResult({name: [1.0] * 3 for name in artifacts}, {}, {}, {name: [1.0] * 3 for name in artifacts})

    monkeypatch.setattr(network_timer, "run_child", child)
    artifacts = {name: Path(name) for name in NAMES}
    found = time_networks(artifacts, Path("reference"), host(), rounds=1)
    assert set(found.samples) == set(NAMES) - {"c"}
    assert found.failed == {"c": "artifact 'reference': outputs differ"}
    broken = True
    with pytest.raises(RunError, match="outputs differ"):
        time_networks(artifacts, Path("reference"), host(), rounds=1)


@pytest.mark.parametrize("later", [True, False])
def test_a_guess_of_what_is_quiet_is_put_right_by_a_quiet_moment_after_the_networks(
    measuring: TableMeasuring, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    """A neighbour that slowed the kernel and not the network had made nothing quiet."""
    told = iter([(2e-5, False), (2.9e-5, True) if later else (2.1e-5, False)])
    monkeypatch.setattr(network_timer, "time_networks", lambda *given, **keys: Timed({"one": QUIET}, 2e-5, {}))
    monkeypatch.setattr(reference_timer, "quiet_network_s", lambda *given: next(told))
    measuring.database.add([KernelTime(WORK, settled(QUIET, 3e-5))], {f"kernel {WORK.key()}": 2e-5})
    [found] = networks(measuring, planned())
    assert found.time.quiet == later
    assert not measuring.slower  # than a guess: that says nothing of the machine
    assert next(told, None) is None
