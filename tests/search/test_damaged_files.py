"""Files of a run with any damage: every reader tells one line or goes on, and nothing in a file is ever run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from planish.hwmodels.kernel_database import DatabaseError, KernelDatabase, KernelTime
from planish.hwmodels.quiet import Settled
from planish.hwmodels.workload import Workload
from planish.search.cli import main
from planish.search.errors import UserError
from planish.search.rundir import RunDirectory
from planish.spaces import Choice, Kind, SearchSpace

pytestmark = pytest.mark.tvm

JSON_FILES = ("front.json", "space.json", "provenance.json")
many = settings(max_examples=40, suppress_health_check=list(HealthCheck))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "cpu", "../..", "/etc/passwd", "<script>", "\x00", "latency[cpu]", "9" * 400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def sound(make_run: Callable[[Path, tuple[str, ...]], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test changes."""
    run = make_run(tmp_path_factory.mktemp("sound") / "run", ("cpu",))
    with RunDirectory.resume(run) as folder:
        folder.write_space(SearchSpace((Choice("0", Kind.PRUNE, (0.0, 0.25, 0.5, 0.75)),), {"1": "too small"}))
    return run


def damaged(sound: Path, name: str, content: bytes) -> Path:
    """The run with one file replaced, artifacts left out."""
    run = sound.parent / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(sound, run, ignore=shutil.ignore_patterns("trials"))
    (run / name).write_bytes(content)
    return run


def read_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What reads a run: nothing of it may fail but with a line."""
    for command in (["status", run], ["status", run, "--json"], ["report", run], ["export", run, "--out", run / "x"]):
        code = main([str(part) for part in command])
        told = capsys.readouterr()
        assert code in (0, 2), (command, told.err)
        assert "Traceback" not in told.err
        if code == 2:
            assert len(told.err.splitlines()) == 1
    # A controller that carries on; it must not write over what it cannot read.
    before = (run / "trials.jsonl").read_bytes()
    with suppress(UserError), RunDirectory.resume(run) as folder:
        folder.spec(), folder.space(), folder.history()
    after = (run / "trials.jsonl").read_bytes()
    # Torn at its end, as a kill leaves it, it loses what was torn and no more.
    assert before.startswith(after)
    assert before[len(after) :].count(b"\n") <= 1


def struck(content: bytes, data: st.DataObject) -> bytes:
    """The bytes with a part cut out, doubled or replaced."""
    start = data.draw(st.integers(0, max(0, len(content) - 1)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    return content[:start] + data.draw(st.binary(max_size=12)) + content[data.draw(st.sampled_from((start, end))) :]


def replaced(document: Any, data: st.DataObject) -> Any:
    """The document with one value, at any depth, that is something else or gone."""
    if isinstance(document, dict) and document and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(document)))
        if data.draw(st.integers(0, 9)) == 0:
            return {name: value for name, value in document.items() if name != key}
        return {**document, key: replaced(document[key], data)}
    if isinstance(document, list) and document and data.draw(st.integers(0, 9)):
        place = data.draw(st.integers(0, len(document) - 1))
        return [*document[:place], replaced(document[place], data), *document[place + 1 :]]
    return data.draw(values)


@pytest.mark.parametrize("name", ["trials.jsonl", "spec.toml", *JSON_FILES])
@many
@given(data=st.data())
def test_bytes_that_changed_are_told_or_do_not_matter(
    sound: Path, name: str, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    read_everything(damaged(sound, name, struck((sound / name).read_bytes(), data)), capsys)


@pytest.mark.parametrize("name", JSON_FILES)
@many
@given(data=st.data())
def test_values_that_changed_are_told_or_do_not_matter(
    sound: Path, name: str, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    document = replaced(json.loads((sound / name).read_bytes()), data)
    read_everything(damaged(sound, name, json.dumps(document).encode()), capsys)


@many
@given(data=st.data())
def test_events_that_changed_are_told_or_do_not_matter(
    sound: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    lines = (sound / "trials.jsonl").read_bytes().splitlines()
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = json.dumps(replaced(json.loads(lines[place]), data)).encode()
    read_everything(damaged(sound, "trials.jsonl", b"\n".join(lines) + b"\n"), capsys)


@pytest.mark.parametrize("content", [b"", b"[", b"[" * 100_000, b"null", b"\xff"])
def test_a_damaged_recipe_costs_nothing_but_a_line(
    sound: Path, content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sound, run)
    (run / "trials" / "0003" / "recipe.json").write_bytes(content)
    assert main(["export", str(run), "--trial", "3", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "recipe.json" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("latency", [{"cpu": {}}, {"cpu": 3}, {"cpu": {"value": 10**400}}, {"cpu": None}])
def test_a_latency_without_a_value_is_none(
    sound: Path, latency: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    front = json.loads((sound / "front.json").read_bytes())
    for entry in front["front"]:
        entry["metrics"]["latency_s"] = latency
    read_everything(damaged(sound, "front.json", json.dumps(front).encode()), capsys)


@pytest.mark.parametrize("content", [b"", b"[", b"[" * 100_000, b"null", b"{}", b"\xff\xfe", b'{"front": [{}]}'])
@pytest.mark.parametrize("name", ["trials.jsonl", "spec.toml", *JSON_FILES])
def test_files_of_something_else_are_told(
    sound: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    read_everything(damaged(sound, name, content), capsys)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel database with a few times."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.sqlite"
    times = [
        KernelTime(Workload("", "conv2d", {"n": n}, n, n), Settled(1e-6 * n, 9e-7 * n, 2e-6 * n, 9, True))
        for n in range(1, 20)
    ]
    KernelDatabase(path, "device", "schedules", "A device").add(times, {"reference": 1e-6})
    return path


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_database_with_any_damage_is_read_or_told(database: Path, data: st.DataObject) -> None:
    path = database.parent / "damaged.sqlite"
    path.write_bytes(struck(database.read_bytes(), data))
    found = KernelDatabase(path, "device", "schedules")
    for read in (found.times, found.networks, found.tiles, found.contents, lambda: found.reference_s("reference")):
        with suppress(DatabaseError):
            read()
    with suppress(DatabaseError):
        found.add([], {"reference": 2e-6})


def test_a_database_whose_fault_is_no_text_is_told(database: Path) -> None:
    # SQLite says what it cannot parse, and here that is no UTF-8.
    path = database.parent / "damaged.sqlite"
    path.write_bytes(database.read_bytes().replace(b"CREATE TABLE about", b"CREATE \x80ABLE about"))
    found = KernelDatabase(path, "device", "schedules")
    for read in (found.times, found.networks, found.tiles, found.contents, lambda: found.reference_s("reference")):
        with pytest.raises(DatabaseError, match="cannot be read"):
            read()
    with pytest.raises(DatabaseError, match="cannot be written"):
        found.add([], {"reference": 2e-6})


@example(b"")
@given(st.binary(max_size=300))
def test_any_bytes_as_a_database_are_told(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.sqlite"
        path.write_bytes(content)
        with suppress(DatabaseError):
            KernelDatabase(path, "device", "schedules").times()
