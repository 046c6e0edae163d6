"""An artifact is timed only after it was shown to be whole, made for this CPU, and right."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from planish.compilers import cpu_features, manifest
from planish.compilers.compiler import RunError
from planish.compilers.cpu_features import instruction_set, lacking
from planish.search import bench as bench_file
from planish.search.bench import bench, bench_text
from planish.search.cli import main
from planish.search.errors import UserError
from planish.search.exporting import export_run


@pytest.fixture
def artifact(models: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of a compiled model with the original beside it."""
    shutil.copytree(models.smaller, tmp_path / "mine")
    shutil.copytree(models.original, tmp_path / "mine/original")
    return tmp_path / "mine"


def _change(folder: Path, **fields: Any) -> None:
    """Writes a manifest with other fields and with the checksums that the files have now."""
    found = manifest._parse(folder)
    files = {name: manifest.digest(folder / name) for name in found.files}
    replace(found, **{"files": files, **fields}).write(folder)


def _one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("planish: ")


@pytest.mark.tvm
def test_a_model_is_checked_and_timed_beside_its_original(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_file, "_PROCESSES", 1)
    monkeypatch.setattr(bench_file, "_RETRIES", 0)
    export_run(run, None, 1, tmp_path / "mine")
    assert main(["bench", str(tmp_path / "mine"), "--runs", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parity_ok"] is True
    assert 0 <= result["max_error"] <= result["tolerance"] == 1e-3
    assert result["ci95"][0] <= result["latency_s"] <= result["ci95"][1]
    assert result["speedup"] == pytest.approx(result["original_latency_s"] / result["latency_s"])
    assert (result["threads"], result["batch"], result["device"]) == (1, 1, "cpu")
    assert isinstance(result["drifted"], bool)


@pytest.mark.tvm
def test_a_model_without_an_original_beside_it_has_no_speedup(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_file, "_PROCESSES", 1)
    monkeypatch.setattr(bench_file, "_RETRIES", 0)
    result = bench(models.smaller, 3)
    assert (result["speedup"], result["original_latency_s"]) == (None, None)
    assert len(bench_text(result).splitlines()) == (3 if result["drifted"] else 2)


@pytest.mark.tvm
def test_outputs_that_are_not_the_stored_ones_are_told_with_the_difference(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(artifact / "examples.npz") as stored:
        inputs, outputs = stored["inputs"], stored["outputs"]
    np.savez(artifact / "examples.npz", inputs=inputs, outputs=outputs * 0.5)
    _change(artifact)
    line = _one_line(capsys, str(artifact))
    assert "outputs differ from the stored ones by 1 of the largest output; at most 0.001 is allowed" in line
    assert line.startswith(f"{artifact} is not usable: ")


@pytest.mark.tvm
def test_a_library_that_is_none_is_told_in_one_line(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "model.so").write_bytes(b"no library")
    _change(artifact)
    assert "is not usable: artifact 'artifact' failed: " in _one_line(capsys, str(artifact))


@pytest.mark.tvm
@pytest.mark.parametrize("name", ["model.so", "examples.npz", "original/model.so"])
def test_a_changed_and_a_missing_file_are_named_before_anything_is_loaded(
    artifact: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_file, "check", pytest.fail)
    data = bytearray((artifact / name).read_bytes())
    data[-1] ^= 1
    (artifact / name).write_bytes(data)
    assert f"{artifact / name} is not the file that was exported" in _one_line(capsys, str(artifact))
    (artifact / name).unlink()
    assert f"{artifact / name} is missing" in _one_line(capsys, str(artifact))


@pytest.mark.tvm
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"files": {"../../etc/passwd": "0" * 64}},
            "names the file '../../etc/passwd', which is not inside the folder",
        ),
        ({"files": {"/etc/passwd": "0" * 64}}, "names the file '/etc/passwd', which is not inside the folder"),
        ({"library": "../model.so"}, "gives no checksum for its library '../model.so'"),
        ({"compiler": "os.system"}, "compiler 'os.system' is not known; known are tvm, torch"),
        ({"device": "toaster"}, "device 'toaster' is not known"),
        ({"device": "cpu?threads=999999"}, "asks for 999999 threads"),
        ({"device": "cuda/sm_90"}, "device 'cuda/sm_90' is not usable here"),
        ({"threads": float("inf")}, "is not a manifest: OverflowError"),
        ({"inputs": ({"name": "x"},)}, "is not a manifest: KeyError 'shape'"),
    ],
)
def test_a_hostile_manifest_is_refused_in_one_line(
    artifact: Path,
    fields: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_file, "check", pytest.fail)
    _change(artifact, **fields)
    assert message in _one_line(capsys, str(artifact))


@pytest.mark.tvm
def test_a_model_for_a_cpu_with_more_is_refused_instead_of_crashing(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_file, "check", pytest.fail)
    features = f"{instruction_set()['features']} avx999 neon9"
    _change(artifact, target={"kind": "llvm", "mcpu": "host", "features": features})
    line = _one_line(capsys, str(artifact))
    assert line.startswith(
        f"{artifact} was compiled for a CPU that has what this one lacks: avx999, neon9; run it there"
    )


@pytest.mark.tvm
def test_a_compiled_model_records_what_this_cpu_has(models: SimpleNamespace) -> None:
    target = manifest.read(models.smaller).target
    assert {key: target[key] for key in ("machine", "features")} == instruction_set()
    assert lacking(target) is None


@pytest.mark.parametrize(
    ("target", "lacks"),
    [
        ({}, None),
        ({"machine": "toaster"}, "a CPU of the kind toaster (this one is x86_64)"),
        ({"machine": "x86_64", "features": "avx2 fma"}, None),
        ({"machine": "x86_64", "features": "fma avx512f avx2 avx512bw"}, "avx512bw, avx512f"),
    ],
)
def test_a_cpu_lacks_what_is_recorded_and_not_here(
    target: dict[str, str], lacks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_features, "cpu_flags", lambda: frozenset({"avx2", "fma", "hypervisor"}))
    assert instruction_set() == {"machine": "x86_64", "features": "avx2 fma"}
    assert lacking(target) == lacks


def test_a_system_that_lists_no_features_is_not_said_to_lack_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "cpu_flags", frozenset)
    assert lacking({"features": "avx2"}) is None


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no compiled model (no manifest.json)" in _one_line(capsys, str(tmp_path))
    assert "is no compiled model" in _one_line(capsys, str(tmp_path / "nowhere"))


def test_a_folder_of_several_devices_names_one_of_them(tmp_path: Path) -> None:
    for name in ("cpu", "cpu-threads-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=f"holds a model for each of several devices; name one: {tmp_path / 'cpu'}"):
        bench(tmp_path, None)


def test_too_few_runs_are_refused_before_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _one_line(capsys, str(tmp_path), "--runs", "2") == "runs is 2; at least 3 is needed"


def test_the_text_gives_units_the_interval_and_the_speedup() -> None:
    result: dict[str, object] = {
        "folder": "mine", "parity_ok": True, "max_error": 1.23e-6, "tolerance": 1e-3, "latency_s": 8.1e-5,
        "ci95": [8e-5, 8.25e-5], "original_latency_s": 5.33e-4, "speedup": 6.58, "threads": 2, "batch": 1,
        "device": "cpu?threads=2", "drifted": True, "energy_j": None,
    }  # fmt: skip
    assert bench_text(result).splitlines() == [
        "mine: computes what was stored with it (differs by 1.2e-06 of the largest output, allowed are 0.001)",
        "latency   81 us on cpu, 2 threads, batch 1 (95 % interval of the median: 80 us to 82.5 us)",
        "original  533 us, in turns with it: 6.58x as fast as the original",
        "the machine was not quiet: from its first to its last third the timing moved more than 3%",
    ]
    found = bench_text({**result, "energy_j": 0.00123}).splitlines()
    assert found[2] == "energy    1.23 mJ a run, by the counters of the processor's packages"


@pytest.mark.parametrize(("checked_s", "limit_s"), [(0.01, 60.0), (20.0, 16 * 30 * 20.0)])
def test_slow_models_have_as_long_as_their_runs_take(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, checked_s: float, limit_s: float
) -> None:
    clock, given = [0.0], []

    def check(path: Path, device: object, *, time_limit_s: float) -> float:
        assert time_limit_s >= 600
        clock[0] += checked_s
        return 0.0

    def measure(artifacts: object, device: object, protocol: Any) -> Any:
        given.append(protocol.time_limit_s)
        raise RunError("seen")

    monkeypatch.setattr(bench_file, "check", check)
    monkeypatch.setattr(bench_file, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(bench_file, "compiler_for", lambda device, name: SimpleNamespace(measure=measure))
    with pytest.raises(UserError, match="seen"):
        bench(artifact, 30)
    assert given == [pytest.approx(limit_s)]
