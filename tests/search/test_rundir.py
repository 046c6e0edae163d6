"""A run's folder: made once, worked in by one controller, carried on only with the same specification."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from planish.search.config import Spec, load_spec
from planish.search.errors import UserError
from planish.search.lock import FolderLock, holder
from planish.search.provenance import provenance
from planish.search.rundir import RunDirectory
from planish.search.trial import State, Trial
from planish.spaces import Candidate, Choice, Kind, SearchSpace

SPACE = SearchSpace((Choice("a", Kind.PRUNE, (0.0, 0.5)), Choice("b", Kind.BITS, (None, 8))), {"fc": "too small"})


def _spec(**overrides: object) -> Spec:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_spec(None, {"model": "m", "data": "d", **keys})


def _trial(number: int, state: State = State.COMPLETE) -> Trial:
    done = state is not State.RUNNING
    return Trial(number, SPACE.decode([number % 2, 0]), state, {"accuracy": 0.5} if done else {}, None, number, 1)


def test_a_new_run_holds_specification_and_provenance(tmp_path: Path) -> None:
    spec = _spec(seed=3)
    with RunDirectory.create(tmp_path / "runs" / "mine", spec, provenance(spec, "planish search")) as run:
        assert run.spec() == spec
        assert run.trials() == []
    found = json.loads((tmp_path / "runs" / "mine" / "provenance.json").read_text())
    assert {"versions", "commit", "devices", "seed", "command", "python", "platform"} <= set(found)


def test_provenance_names_neither_the_machine_nor_its_folders(tmp_path: Path) -> None:
    text = json.dumps(provenance(_spec(), "planish search"))
    assert str(Path(__file__).parent) not in text
    assert str(Path.home()) + "/" not in text
    assert f'"{os.uname().nodename}"' not in text


def test_trials_come_back_after_reopening(tmp_path: Path) -> None:
    trials = [_trial(0), _trial(1, State.RUNNING), _trial(2, State.FAILED)]
    with RunDirectory.create(tmp_path / "r", _spec(), {}) as run:
        for trial in trials:
            run.append(trial)
    assert RunDirectory.open(tmp_path / "r").trials() == trials
    with RunDirectory.resume(tmp_path / "r") as run:
        run.append(_trial(1))
        run.append(_trial(1, State.FAILED))
        assert run.trials()[1] == _trial(1)


def test_a_trial_that_is_recorded_already_is_not_written_again(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", _spec(), {}) as run:
        run.append(_trial(0, State.RUNNING))
        run.append(_trial(0))
    size = (tmp_path / "r" / "trials.jsonl").stat().st_size
    with RunDirectory.resume(tmp_path / "r") as run:
        run.append(_trial(0, State.RUNNING))
        run.append(_trial(0))
    assert (tmp_path / "r" / "trials.jsonl").stat().st_size == size


def test_scores_measures_rungs_and_phases_are_recorded(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", _spec(), {}) as run:
        run.phase("search", 5, "score")
        run.phase("distill to epoch 1", 2, "rung", [3, 1])
        run.append(_trial(0, State.RUNNING))
        run.score(0, {"accuracy": 0.4})
        run.rescore(0, {"accuracy": 0.5})
        run.measure(0, "cpu", {"latency_s": {"cpu": {"value": 1.0}}})
        run.rung(0, 1, 3, {"accuracy": 0.6})
    history = RunDirectory.open(tmp_path / "r").history()
    assert [(p.name, p.total, p.unit, p.trials) for p in history.phases] == [
        ("search", 5, "score", ()), ("distill to epoch 1", 2, "rung", (3, 1)),
    ]  # fmt: skip
    assert history.trials()[0].metrics == {"accuracy": 0.6, "latency_s": {"cpu": {"value": 1.0}}}


def test_the_same_specification_carries_on_and_workers_may_differ(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", _spec(workers=1), {}) as run:
        run.append(_trial(0))
    with RunDirectory.create(tmp_path / "r", _spec(workers=8, address="ray://head:10001"), {"new": 1}) as run:
        assert len(run.trials()) == 1
    assert json.loads((tmp_path / "r" / "provenance.json").read_text()) == {}


def test_another_specification_is_refused_naming_the_first_key_and_both_values(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "r", _spec(search__trials=50), {}).close()
    with pytest.raises(UserError, match=r"search\.trials = 50 .* asks for 60; .*--out.*planish resume"):
        RunDirectory.create(tmp_path / "r", _spec(search__trials=60, distill__alpha=0.5), {})
    RunDirectory.resume(tmp_path / "r").close()


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds no run \(found thesis\.tex\)"):
        RunDirectory.create(tmp_path, _spec(), {})
    with pytest.raises(UserError, match="is a file"):
        RunDirectory.create(tmp_path / "thesis.tex", _spec(), {})


def test_a_creation_that_was_killed_halfway_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / ".spec.toml.abc.tmp").write_text("mod")
    RunDirectory.create(tmp_path, _spec(), {}).close()
    assert RunDirectory.open(tmp_path).spec() == _spec()


@pytest.mark.parametrize("open_it", [RunDirectory.open, RunDirectory.resume])
def test_a_folder_without_a_run_is_refused_and_left_as_it_is(tmp_path: Path, open_it: object) -> None:
    assert callable(open_it)
    with pytest.raises(UserError, match="holds no run"):
        open_it(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        RunDirectory.create(tmp_path / "file" / "run", _spec(), {})


def test_a_space_that_changed_since_is_refused(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", _spec(), {}) as run:
        run.write_space(SPACE)
        run.write_space(SPACE)
        assert run.space() == SPACE
        with pytest.raises(UserError, match=r"space\.json.*--out"):
            run.write_space(SearchSpace(SPACE.choices[:1], {}))


@pytest.mark.parametrize("text", ["{", "[]", '{"choices": 3}', '{"choices": [{}], "left_out": {}}'])
def test_a_damaged_space_is_named(tmp_path: Path, text: str) -> None:
    RunDirectory.create(tmp_path / "r", _spec(), {}).close()
    (tmp_path / "r" / "space.json").write_text(text)
    with pytest.raises(UserError, match=r"space\.json"):
        RunDirectory.open(tmp_path / "r").space()


def test_trial_folders_are_numbered_with_four_digits_and_reading_makes_none(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", _spec(), {}) as run:
        assert run.trial_folder(7) == tmp_path / "r" / "trials" / "0007"
        assert run.trial_folder(7).is_dir()
    assert not RunDirectory.open(tmp_path / "r").trial_folder(8).exists()


def test_a_resumption_records_only_what_changed(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", _spec(), {"python": "3.10", "command": "a"}) as run:
        run.add_resumption({"python": "3.10", "command": "b"})
        run.add_resumption({"python": "3.11", "command": "a"})
        assert run.provenance() == {
            "python": "3.10",
            "command": "a",
            "resumed": [{"command": "b"}, {"python": "3.11"}],
        }


def test_resumption_works_from_another_folder_and_after_moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "net.py").touch()
    monkeypatch.chdir(project)
    RunDirectory.create(Path("runs/r"), load_spec(None, {"model": "net.py:make", "data": "d"}), {}).close()
    assert str(tmp_path) not in (project / "runs" / "r" / "spec.toml").read_text()
    monkeypatch.chdir(tmp_path)
    assert RunDirectory.open(Path("project/runs/r")).spec().model == f"{project / 'net.py'}:make"
    project.rename(tmp_path / "moved")
    assert RunDirectory.open(Path("moved/runs/r")).spec().model == f"{tmp_path / 'moved' / 'net.py'}:make"


_HOLD = """
import sys
from pathlib import Path
from planish.search.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path."""
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdin=pipe, stdout=pipe, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "locked\n"
    yield child
    child.kill()
    child.communicate()


def test_a_second_controller_is_refused_and_the_first_is_named(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=f"in use by planish process {other.pid} on .* since"):
        FolderLock(tmp_path)
    assert f"process {other.pid} " in str(holder(tmp_path))


def test_the_lock_of_a_killed_controller_is_taken_over(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    assert holder(tmp_path) is None
    with FolderLock(tmp_path):
        assert f"process {os.getpid()} " in str(holder(tmp_path))
    assert holder(tmp_path) is None


def test_two_controllers_of_one_process_are_two_controllers(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path)
    FolderLock(tmp_path).release()


def test_reading_needs_no_lock(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", _spec(), {}) as run:
        run.append(_trial(0))
        assert RunDirectory.open(tmp_path / "r").trials() == [_trial(0)]


def test_a_failed_creation_gives_the_lock_back(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "r", _spec(), {}).close()
    with pytest.raises(UserError, match="seed"):
        RunDirectory.create(tmp_path / "r", _spec(seed=1), {})
    (tmp_path / "r" / "trials.jsonl").write_bytes(b"garbage\n{}\n")
    with pytest.raises(UserError, match=r"trials\.jsonl:1"):
        RunDirectory.resume(tmp_path / "r")
    FolderLock(tmp_path / "r").release()


def _mounted(disk: Path, options: str) -> Iterator[Path]:
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    yield from _mounted(tmp_path / "disk", "size=64k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user cannot write, even as root."""
    if os.geteuid() == 0:
        yield from _mounted(tmp_path / "disk", "ro")
    else:
        (tmp_path / "disk").mkdir(mode=0o500)
        yield tmp_path / "disk"


def test_a_full_disk_leaves_the_old_front_and_every_recorded_trial(small_disk: Path) -> None:
    front: dict[str, object] = {"objectives": [], "original": {}, "front": [], "nearest_miss": None, "hypervolume": 0.5}
    with RunDirectory.create(small_disk / "r", _spec(), {}) as run:
        run.write_front(front)
        recorded = 0
        told = ""
        while not told:
            try:
                run.append(_trial(recorded))
                recorded += 1
            except UserError as error:
                told = str(error)
        assert re.search(r"the disk is full; .*planish resume", told)
        with pytest.raises(UserError, match="the disk is full"):
            run.write_front({**front, "filling": "-" * 100_000})
        assert run.front() == front
    found = RunDirectory.open(small_disk / "r").trials()
    assert found[:recorded] == [_trial(number) for number in range(recorded)]
    assert [path.name for path in (small_disk / "r").glob(".*.tmp")] == []


def test_a_read_only_folder_is_a_user_error(read_only: Path) -> None:
    for folder in (read_only, read_only / "new"):
        with pytest.raises(UserError, match=r"(read-only|permission is denied); choose another folder"):
            RunDirectory.create(folder, _spec(), {})


def test_candidates_keep_the_types_of_their_options(tmp_path: Path) -> None:
    options: dict[str, int | float | str | None] = {"a": 0.0, "b": 0, "c": None, "d": "0", "e": 1e-7}
    with RunDirectory.create(tmp_path / "r", _spec(), {}) as run:
        run.append(Trial(0, Candidate(options), State.RUNNING, {}, None, 0))
        (found,) = run.trials()
    assert [type(value) for value in found.candidate.options.values()] == [float, int, type(None), str, float]
    assert found.candidate.key() == Candidate(options).key()


def test_a_run_whose_provenance_is_lost_is_carried_on(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "r", _spec(), {"command": "planish search"}) as run:
        (run.path / "provenance.json").unlink()
        run.add_resumption({"command": "planish resume r", "seed": 0})
        assert run.provenance() == {"resumed": [{"command": "planish resume r", "seed": 0}]}
