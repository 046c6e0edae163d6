"""The database of kernel times: what goes in comes out, whoever writes, and nothing wrong is ever given out."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from planish.hwmodels.kernel_database import DatabaseError, KernelDatabase, KernelTime, NetworkTime
from planish.hwmodels.quiet import Settled
from planish.hwmodels.workload import Workload

WORK = Workload("", "conv2d", {"c": 16, "o": 32}, 1000, 2000, 8, 500, 1, "form", 12.5)
TIME = Settled(2e-6, 1.5e-6, 3e-6, 12, True)


def _kernel(number: int, time: Settled = TIME) -> KernelTime:
    return KernelTime(replace(WORK, shapes={"c": number}), time)


@pytest.fixture
def database(tmp_path: Path) -> KernelDatabase:
    return KernelDatabase(tmp_path / "folder" / "times.sqlite", "device", "v1", "A device")


def test_what_was_added_comes_out(database: KernelDatabase) -> None:
    network = NetworkTime((WORK, replace(WORK, site="fc")), TIME)
    database.add([_kernel(1), _kernel(2), network], {"reference": 1e-5})
    assert database.times() == {k.workload.key(): k for k in (_kernel(1), _kernel(2))}
    assert database.networks() == [network]
    assert database.reference_s("reference") == 1e-5
    assert database.reference_s("another") is None


def test_a_file_that_is_not_there_holds_nothing(database: KernelDatabase) -> None:
    assert (database.times(), database.networks(), database.contents()) == ({}, [], [])
    assert database.reference_s("reference") is None
    assert not database.path.exists()


@pytest.mark.parametrize(("device", "schedules"), [("another", "v1"), ("device", "v2")])
def test_another_device_or_version_is_not_given_out_but_listed(
    database: KernelDatabase, device: str, schedules: str
) -> None:
    database.add([_kernel(1)], {"reference": 1e-5})
    other = KernelDatabase(database.path, device, schedules)
    assert (other.times(), other.networks(), other.reference_s("reference")) == ({}, [], None)
    (held,) = other.contents()
    assert (held.device, held.schedules, held.title, held.kernels, held.quiet) == ("device", "v1", "A device", 1, 1)


def test_a_quiet_time_is_only_replaced_by_a_quiet_one(database: KernelDatabase) -> None:
    loud, later = replace(TIME, median_s=2.5e-6, quiet=False), replace(TIME, median_s=1.9e-6)
    for time, expected in ((TIME, TIME), (loud, TIME), (later, later)):
        database.add([_kernel(1, time)], {})
        assert next(iter(database.times().values())).time == expected


def test_of_a_reference_the_fastest_time_counts(database: KernelDatabase) -> None:
    for seconds in (2e-5, 1e-5, 3e-5):
        database.add([], {"reference": seconds})
    assert database.reference_s("reference") == 1e-5


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_reference_that_took_no_time_is_neither_taken_nor_given_out(database: KernelDatabase, seconds: float) -> None:
    database.add([], {"reference": 1e-5})
    with pytest.raises(ValueError, match="positive and finite"):
        database.add([], {"reference": seconds})
    assert database.reference_s("reference") == 1e-5
    with sqlite3.connect(database.path) as connection:
        connection.execute("UPDATE refs SET reference_s = 0")
    connection.close()
    with pytest.raises(DatabaseError, match="damaged"):
        database.reference_s("reference")


def test_two_machines_databases_merge(database: KernelDatabase, tmp_path: Path) -> None:
    database.add([_kernel(1)], {"reference": 1e-5})
    other = KernelDatabase(tmp_path / "other.sqlite", "elsewhere", "v1", "Another")
    other.add([_kernel(2), NetworkTime((WORK,), TIME)], {"reference": 2e-5})
    exported = tmp_path / "exported.sqlite"
    assert other.export(exported) == 1
    assert database.merge(exported) == 1
    assert {held.title for held in database.contents()} == {"A device", "Another"}
    assert len(database.times()) == 1
    assert len(KernelDatabase(database.path, "elsewhere", "v1").times()) == 1
    assert len(KernelDatabase(database.path, "elsewhere", "v1").networks()) == 1


def test_export_overwrites_nothing(database: KernelDatabase, tmp_path: Path) -> None:
    database.add([_kernel(1)], {})
    (tmp_path / "there").write_text("mine")
    with pytest.raises(DatabaseError, match="there exists"):
        database.export(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"


def _write(path: Path, start: int) -> None:
    database = KernelDatabase(path, "device", "v1", "A device")
    for number in range(start, start + 20):
        database.add([_kernel(number)], {"reference": 1e-5})


def test_many_processes_write_at_once(database: KernelDatabase) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(database.path, 100 * n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(database.times()) == 60


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE times SET workload = 'no JSON'",
        "UPDATE times SET workload = '[]'",
        "UPDATE times SET workload = replace(workload, '\"bits\": 8', '\"bits\": 4')",
        "UPDATE times SET median_s = -1",
        "UPDATE times SET median_s = 'often'",
        "UPDATE times SET high_s = 9e999",
        "UPDATE about SET format = 99",
        "DELETE FROM about",
        "DROP TABLE times",
    ],
)
def test_damage_is_told_in_one_line_and_never_given_out(database: KernelDatabase, tmp_path: Path, damage: str) -> None:
    database.add([_kernel(1)], {})
    with sqlite3.connect(database.path) as connection:
        connection.execute(damage)
    connection.close()
    mine = KernelDatabase(tmp_path / "mine.sqlite", "device", "v1")
    mine.add([_kernel(2)], {})
    for use in (database.times, lambda: mine.merge(database.path)):
        with pytest.raises(DatabaseError) as caught:
            use()
        assert str(database.path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(mine.times()) == [_kernel(2).workload.key()]


def test_a_file_that_is_no_database_is_told(database: KernelDatabase) -> None:
    database.path.parent.mkdir()
    database.path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    for use in (database.times, database.contents, lambda: database.add([_kernel(1)], {})):
        with pytest.raises(DatabaseError, match="PLANISH_CACHE"):
            use()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_file_can_be_read_and_says_that_it_cannot_be_written(database: KernelDatabase) -> None:
    database.add([_kernel(1)], {})
    database.path.chmod(0o444)
    database.path.parent.chmod(0o555)
    try:
        assert len(database.times()) == 1
        with pytest.raises(DatabaseError, match="cannot be written"):
            database.add([_kernel(2)], {})
    finally:
        database.path.parent.chmod(0o755)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    database = KernelDatabase(tmp_path / "file" / "times.sqlite", "device", "v1")
    with pytest.raises(DatabaseError, match="cannot be written"):
        database.add([_kernel(1)], {})


def test_tiles_come_out_as_they_were_added_for_their_device_and_version_alone(database: KernelDatabase) -> None:
    assert database.tiles() == {}
    database.add_tiles({"conv a": "tile 1", "conv b": "tile 2"})
    database.add_tiles({"conv b": "tile 3"})
    assert database.tiles() == {"conv a": "tile 1", "conv b": "tile 3"}
    assert KernelDatabase(database.path, "another", "v1").tiles() == {}
    assert KernelDatabase(database.path, "device", "v2").tiles() == {}


def test_tiles_travel_with_the_times(database: KernelDatabase, tmp_path: Path) -> None:
    database.add([_kernel(1)], {})
    database.add_tiles({"conv": "tile"})
    copy = tmp_path / "copy.sqlite"
    assert database.export(copy) == 1
    assert KernelDatabase(copy, "device", "v1").tiles() == {"conv": "tile"}


def test_a_file_of_before_there_were_tiles_holds_none(database: KernelDatabase, tmp_path: Path) -> None:
    database.add([_kernel(1)], {})
    with sqlite3.connect(database.path) as connection:
        connection.execute("DROP TABLE tiles")
    assert database.tiles() == {}
    assert database.export(tmp_path / "copy.sqlite") == 1
    database.add_tiles({"conv": "tile"})
    assert database.tiles() == {"conv": "tile"}


def test_a_tile_that_is_no_text_is_damage(database: KernelDatabase) -> None:
    database.add_tiles({"conv": "tile"})
    with sqlite3.connect(database.path) as connection:
        connection.execute("UPDATE tiles SET tile = x'00ff'")
    with pytest.raises(DatabaseError, match=r"is damaged: .* is no tile"):
        database.tiles()
    with pytest.raises(DatabaseError, match="is damaged"):
        KernelDatabase(database.path.parent / "other.sqlite", "device", "v1").merge(database.path)


def test_an_import_leaves_the_references_of_this_machine(database: KernelDatabase, tmp_path: Path) -> None:
    """The same processor at a higher clock would make nothing here quiet again."""
    database.add([_kernel(1)], {"reference": 1e-5})
    faster = KernelDatabase(tmp_path / "faster.sqlite", "device", "v1")
    faster.add([_kernel(2)], {"reference": 5e-6, "network": 3e-5})
    assert database.merge(faster.path) == 1
    assert len(database.times()) == 2
    assert database.reference_s("reference") == 1e-5
    assert database.reference_s("network") is None


@pytest.mark.parametrize("when", ["1e300", "-5", "'late'"])
def test_a_moment_that_no_calendar_has_is_damage(database: KernelDatabase, tmp_path: Path, when: str) -> None:
    other = KernelDatabase(tmp_path / "other.sqlite", "device", "v1")
    other.add([_kernel(1)], {})
    with sqlite3.connect(other.path) as connection:
        connection.execute(f"UPDATE times SET measured = {when}")
    connection.close()
    with pytest.raises(DatabaseError, match="damaged"):
        database.merge(other.path)
    assert database.times() == {}


def test_a_device_and_version_are_known_from_when_something_is_added(database: KernelDatabase) -> None:
    assert not database.knows_device()
    database.add([], {})
    assert database.knows_device()
    assert not KernelDatabase(database.path, "device", "v2").knows_device()


def test_a_folder_that_may_not_be_searched_is_told(database: KernelDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may search every folder, so what the system would say is said for it."""

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    for read in (database.times, database.networks, database.tiles, database.contents, database.knows_device):
        with pytest.raises(DatabaseError, match=r"cannot be read: .*Permission denied"):
            read()


def test_a_reference_that_turns_out_faster_takes_the_quiet_from_what_it_judged(database: KernelDatabase) -> None:
    network = NetworkTime((WORK,), TIME)
    database.add([network], {"network": 4e-5})
    database.add([_kernel(1)], {"kernel": 3e-5})
    other = KernelDatabase(database.path, "another", "v1")
    other.add([_kernel(1)], {"kernel": 3e-5})
    # The machine was half as fast again as it can be; what is added now was judged by that.
    assert database.add([_kernel(2)], {"kernel": 2e-5}) == 1
    found = {entry.workload.shapes["c"]: entry.time for entry in database.times().values()}
    assert found[2] == TIME
    assert not found[1].quiet
    assert (found[1].median_s, found[1].low_s, found[1].high_s) == pytest.approx((4e-6 / 3, 1e-6, 2e-6))
    # Networks have a reference of their own, and so has every device.
    assert database.networks() == [network]
    assert next(iter(other.times().values())).time == TIME
    # Measured anew it counts again.
    assert database.add([_kernel(1)], {"kernel": 2e-5}) == 0
    assert all(entry.time == TIME for entry in database.times().values())


def test_a_reference_that_gets_faster_little_by_little_takes_the_quiet_as_well(database: KernelDatabase) -> None:
    for number, (seconds, questioned) in enumerate([(1e-5, 0), (0.93e-5, 0), (0.85e-5, 2), (0.8e-5, 0)]):
        assert database.add([_kernel(number)], {"kernel": seconds}) == questioned
    assert database.reference_s("kernel") == 0.8e-5
    assert sorted(e.workload.shapes["c"] for e in database.times().values() if e.time.quiet) == [2, 3]


def test_an_empty_file_holds_nothing(database: KernelDatabase) -> None:
    """A full disk leaves one, and so does a process that is about to write for the first time."""
    database.path.parent.mkdir()
    database.path.touch()
    assert (database.times(), database.networks(), database.contents(), database.tiles()) == ({}, [], [], {})
    assert database.reference_s("reference") is None
    database.add([_kernel(1)], {"reference": 1e-5})
    assert len(database.times()) == 1


def test_a_name_that_the_system_does_not_take_is_told(database: KernelDatabase, tmp_path: Path) -> None:
    database.add([_kernel(1)], {})
    for call in (database.export, database.merge):
        with pytest.raises(DatabaseError, match="cannot be"):
            call(tmp_path / ("x" * 300))


def test_an_empty_file_is_imported_and_exported_as_what_it_holds(database: KernelDatabase, tmp_path: Path) -> None:
    """The first who wrote to it met a full disk."""
    (tmp_path / "empty.sqlite").touch()
    assert database.merge(tmp_path / "empty.sqlite") == 0
    empty = KernelDatabase(tmp_path / "empty.sqlite", database.device, database.schedules)
    assert empty.export(tmp_path / "copy.sqlite") == 0
    assert KernelDatabase(tmp_path / "copy.sqlite", database.device, database.schedules).times() == {}
