"""What the journal acknowledged survives kills, torn lines and full disks; what it cannot read it names."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.search.errors import UserError
from planish.search.journal import Journal, read_events
from planish.search.replay import History, replay
from planish.search.trial import State


def _write(path: Path, *events: dict[str, object]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def _start(trial: int, **more: object) -> dict[str, object]:
    return {"event": "start", "trial": trial, "batch": 0, "seed": 5, "options": {"a": 1}, "time": 1.0, **more}


def _event(kind: str, trial: int, **more: object) -> dict[str, object]:
    return {"event": kind, "trial": trial, "metrics": {}, "time": 2.0, **more}


def _history(path: Path) -> History:
    return replay(read_events(path), path)


def test_events_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    clock = itertools.count(100.0)
    journal = Journal(tmp_path / "trials.jsonl", clock=lambda: next(clock))
    for number in range(3):
        journal.append({"event": "x", "number": number})
    data = [event.data for event in read_events(tmp_path / "trials.jsonl")]
    assert data == [{"event": "x", "number": n, "time": 100.0 + n} for n in range(3)]


def test_a_clock_that_is_set_back_does_not_reorder_events(tmp_path: Path) -> None:
    clock = iter([1000.0, 10.0, 1001.0])
    journal = Journal(tmp_path / "j", lambda: next(clock))
    journal.append({"event": "a"}, {"event": "b"})
    journal.append({"event": "c"})
    journal.close()
    Journal(tmp_path / "j", lambda: 5.0).append({"event": "d"})
    Journal(tmp_path / "j", lambda: 1001.0).append({"event": "e"})
    found = [(event.data["event"], event.data["time"]) for event in read_events(tmp_path / "j")]
    assert found == [("a", 1000.0), ("b", 1000.0), ("c", 1000.0), ("d", 1000.0), ("e", 1001.0)]


def test_a_journal_of_a_later_version_is_refused_and_one_without_a_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text('{"event":"session","time":1.0}\n')
    assert replay(read_events(path), path).sessions == [1.0]
    path.write_text('{"event":"session","time":1.0,"format":2}\n')
    with pytest.raises(UserError, match=r"j:1: a later planish wrote format 2, this one reads up to 1"):
        replay(read_events(path), path)


def test_a_nan_is_written_as_null(tmp_path: Path) -> None:
    Journal(tmp_path / "j").append({"event": "x", "metrics": {"accuracy": float("nan")}})
    assert read_events(tmp_path / "j")[0].data["metrics"] == {"accuracy": None}


@given(st.data())
def test_a_journal_cut_anywhere_keeps_exactly_its_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("run") / "trials.jsonl"
    _write(path, *({"event": "x", "number": n, "text": "ä" * n} for n in range(4)))
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    assert len(read_events(path)) == whole
    journal = Journal(path)
    journal.append({"event": "after"})
    journal.close()
    assert [event.data["event"] for event in read_events(path)] == ["x"] * whole + ["after"]


def test_reading_a_torn_journal_does_not_change_it(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"event":"x"}\n{"eve')
    read_events(path)
    assert path.read_bytes() == b'{"event":"x"}\n{"eve'


def test_a_last_line_that_a_power_cut_left_empty_of_sense_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"event":"x"}\n' + b"\0" * 20 + b"\n")
    Journal(path).append({"event": "y"})
    assert [event.data["event"] for event in read_events(path)] == ["x", "y"]


@pytest.mark.parametrize("line", [b"garbage", b"\0\0", b"[1]", b"\xff\xfe", b'{"event":"x"}{"event":"y"}'])
@pytest.mark.parametrize("ending", [b"", b'{"to'])
def test_a_corrupt_line_in_the_middle_is_named_by_file_and_line(tmp_path: Path, line: bytes, ending: bytes) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"event":"x"}\n' + line + b'\n{"event":"x"}\n' + ending)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"trials\.jsonl:2: "):
        read_events(path)
    with pytest.raises(UserError, match=r"trials\.jsonl:2: "):
        Journal(path)
    assert path.read_bytes() == before


def test_a_corrupt_line_before_a_torn_one_is_corrupt_and_not_torn(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"event":"x"}\ngarbage\n{"to')
    with pytest.raises(UserError, match=r"trials\.jsonl:2: "):
        read_events(path)


def test_what_append_returned_from_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "j"
    code = f"""
from pathlib import Path
from planish.search.journal import Journal
journal = Journal(Path({str(path)!r}))
for number in range(10**6):
    journal.append({{"event": "x", "number": number, "filling": "-" * 500}})
    print(number, flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(50):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    acknowledged = [int(line) for line in child.stdout.read().splitlines()]
    child.wait()
    events = read_events(path)
    assert len(events) >= max(acknowledged, default=49) + 1
    assert [event.data["number"] for event in events] == list(range(len(events)))


def test_a_full_disk_is_told_with_what_was_kept_and_how_to_carry_on(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "trials.jsonl"
    path.parent.mkdir()
    path.symlink_to("/dev/null")  # its content is empty, as a new journal's is
    journal = Journal(path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._handle)
    with pytest.raises(UserError, match=r"the disk is full; what was recorded is kept; .*planish resume .*mine"):
        journal.append({"event": "x"})


def test_half_a_line_that_did_not_fit_is_cut_off_again(tmp_path: Path) -> None:
    path = tmp_path / "j"
    # A limit on the file's size lets a part of the last line through, as a full disk does.
    code = f"""
import resource
from pathlib import Path
from planish.search.errors import UserError
from planish.search.journal import Journal
journal = Journal(Path({str(path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for number in range(100):
    try:
        journal.append({{"event": "x", "number": number, "filling": "-" * 100}})
    except UserError as error:
        print(number)
        break
"""
    written = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < written < 10
    assert path.read_bytes().endswith(b"}\n")
    assert len(read_events(path)) == written


def test_replay_joins_scores_measures_rungs_and_the_end(tmp_path: Path) -> None:
    path = tmp_path / "j"
    _write(
        path,
        _start(3, batch=1),
        _event("score", 3, metrics={"accuracy": 0.5, "latency_s": {"cpu": {"value": 1.0}, "cuda": {"value": 2.0}}}),
        _event("measure", 3, device="cpu", metrics={"latency_s": {"cpu": {"value": 1.5}}}),
        _event("rung", 3, rung=0, epochs=1, metrics={"accuracy": 0.7}),
        _event("rung", 3, rung=1, epochs=3, metrics={"accuracy": 0.8}),
        _event("end", 3, state="complete", metrics={"size_bytes": 10}, error=None, time=9.0),
    )
    record = _history(path).records[3]
    assert record.trial.metrics == {
        "accuracy": 0.8,
        "latency_s": {"cpu": {"value": 1.5}, "cuda": {"value": 2.0}},
        "size_bytes": 10,
    }
    assert (record.trial.state, record.trial.seed, record.trial.batch) == (State.COMPLETE, 5, 1)
    assert {number: rung.epochs for number, rung in record.rungs.items()} == {0: 1, 1: 3}
    assert record.score is not None
    assert record.score["accuracy"] == 0.5
    assert [record.before(rung)["accuracy"] for rung in (0, 1, 2)] == [0.5, 0.7, 0.8]
    assert record.before(0)["latency_s"] == {"cpu": {"value": 1.5}, "cuda": {"value": 2.0}}
    assert (record.started_s, record.ended_s) == (1.0, 9.0)


@pytest.mark.parametrize(
    "twice",
    [
        [_event("end", 0, state="complete", metrics={"accuracy": 0.9}), _event("end", 0, state="failed", error="late")],
        [_event("score", 0, metrics={"accuracy": 0.9}), _event("score", 0, metrics={"accuracy": 0.1})],
        [_event(k, 0, rung=0, epochs=1, metrics={"accuracy": a}) for k, a in (("rung", 0.9), ("rung", 0.1))],
        [_event("measure", 0, device="cpu", metrics={"accuracy": a}) for a in (0.9, 0.1)],
    ],
)
def test_of_two_equal_facts_the_first_stands(tmp_path: Path, twice: list[dict[str, object]]) -> None:
    path = tmp_path / "j"
    _write(path, _start(0), _start(0, seed=6), *twice)
    trial = _history(path).records[0].trial
    assert trial.metrics == {"accuracy": 0.9}
    assert trial.state is not State.FAILED
    assert trial.seed == 5


def test_rungs_after_an_end_are_kept_and_do_not_change_its_metrics(tmp_path: Path) -> None:
    path = tmp_path / "j"
    end = _event("end", 0, state="complete", metrics={"accuracy": 0.9})
    _write(path, _start(0), end, _event("rung", 0, rung=0, epochs=1, metrics={"accuracy": 0.1}))
    record = _history(path).records[0]
    assert record.rungs[0].metrics == {"accuracy": 0.1}
    assert record.trial.metrics == {"accuracy": 0.9}


def test_a_trial_without_an_end_is_running(tmp_path: Path) -> None:
    path = tmp_path / "j"
    _write(path, _start(0), _event("score", 0, metrics={"accuracy": 0.9}))
    assert _history(path).records[0].trial.state is State.RUNNING


def test_events_of_another_version_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "j"
    _write(path, {"event": "sunshine", "trial": 99}, {"no": "event"}, _start(0))
    assert list(_history(path).records) == [0]


@pytest.mark.parametrize(
    "event",
    [
        _event("end", 7, state="complete"),
        _event("end", 0, state="pruned"),
        _event("score", 0, metrics=3),
        _event("rung", 0, rung="x", epochs=1),
        _event("rung", 0, rung=0),
        _start(1, options=[]),
        _start(-1),
        {"event": "phase", "phase": "search", "time": 1.0},
    ],
)
def test_a_known_event_without_its_keys_is_named_by_file_and_line(tmp_path: Path, event: dict[str, object]) -> None:
    path = tmp_path / "trials.jsonl"
    _write(path, _start(0), event)
    with pytest.raises(UserError, match=r"trials\.jsonl:2: "):
        _history(path)
