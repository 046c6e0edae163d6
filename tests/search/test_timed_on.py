"""A run's latencies are of one processor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from planish.hwmodels.device import parse_device
from planish.search.config import load_spec
from planish.search.errors import UserError
from planish.search.rundir import RunDirectory
from planish.search.timed_on import NAME, keep_devices, vectors_of
from planish.search.vectors import Vectors
from planish.spaces.space import Choice, Kind, SearchSpace


def test_the_same_processor_carries_on_and_another_is_refused(tmp_path: Path) -> None:
    cpu, board = parse_device("cpu"), parse_device("cpu/cortex-a72")
    keep_devices(tmp_path, {"cpu": cpu, "board": board})
    written = (tmp_path / NAME).read_bytes()
    keep_devices(tmp_path, {"cpu": cpu, "board": board})
    other = replace(cpu, identity="0123456789abcdef")
    with pytest.raises(UserError, match=r"are of another cpu \(.+\) than this one .*device:cpu .*--out"):
        keep_devices(tmp_path, {"cpu": other, "board": board})
    assert (tmp_path / NAME).read_bytes() == written


def test_other_threads_are_another_device(tmp_path: Path) -> None:
    keep_devices(tmp_path, {"cpu": parse_device("cpu")})
    with pytest.raises(UserError, match="another cpu"):
        keep_devices(tmp_path, {"cpu": parse_device("cpu?threads=2")})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cpu": 3}', '{"cpu": {"device": "x"}}', "[" * 100_000])
def test_a_damaged_file_is_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UserError, match=rf"{NAME} does not say what the run was timed on"):
        keep_devices(tmp_path, {"cpu": parse_device("cpu")})
    assert (tmp_path / NAME).read_text() == text


def test_the_file_names_no_host(tmp_path: Path) -> None:
    keep_devices(tmp_path, {"cpu": parse_device("cpu")})
    found = json.loads((tmp_path / NAME).read_text())
    assert found["cpu"].keys() == {"device", "processor", "lanes", "tiles"}


@pytest.mark.parametrize("bfloat16", [True, False])
def test_the_vectors_are_those_of_the_devices_that_the_run_began_on(tmp_path: Path, bfloat16: bool) -> None:
    """Whoever trains elsewhere has to find the run's own space, whatever his processor can."""
    with pytest.raises(UserError, match=rf"{NAME} is missing"):
        vectors_of(tmp_path)
    devices = {"a": replace(parse_device("cpu"), lanes=4), "b": replace(parse_device("cpu"), lanes=16)}
    with RunDirectory.create(tmp_path / "run", load_spec(None, {"model": "m", "data": "d"}), {}) as run:
        keep_devices(run.path, devices)
        run.write_space(SearchSpace((Choice("conv", Kind.BITS, (32, *(["bf16"] if bfloat16 else []), 8)),), {}))
    assert vectors_of(tmp_path / "run") == Vectors(16, bfloat16)
    assert vectors_of(tmp_path / "run", lanes=2) == Vectors(2, bfloat16)


def test_tiles_that_are_measured_later_change_no_run(tmp_path: Path) -> None:
    cpu = replace(parse_device("cpu"), tiles={"conv": "direct 4x2"})
    keep_devices(tmp_path, {"cpu": cpu})
    [found] = keep_devices(tmp_path, {"cpu": replace(cpu, tiles={"conv": "winograd", "other": "direct"})}).values()
    assert found == cpu


def test_a_run_of_before_tiles_were_kept_goes_on_with_those_that_are_there(tmp_path: Path) -> None:
    cpu = replace(parse_device("cpu"), tiles={"conv": "direct 4x2"})
    keep_devices(tmp_path, {"cpu": cpu})
    document = json.loads((tmp_path / NAME).read_text())
    del document["cpu"]["tiles"]
    (tmp_path / NAME).write_text(json.dumps(document))
    assert keep_devices(tmp_path, {"cpu": cpu}) == {"cpu": cpu}
    document["cpu"]["tiles"] = {"conv": 3}
    (tmp_path / NAME).write_text(json.dumps(document))
    with pytest.raises(UserError, match="its tiles are"):
        keep_devices(tmp_path, {"cpu": cpu})
