"""An exported model is whole, the one that was asked for, and runs without planish; a failed export leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from planish.compilers import manifest as manifests
from planish.compilers.cpu_features import BY_FILE, instruction_set
from planish.search import exporting
from planish.search.cli import main
from planish.search.errors import UserError
from planish.search.export_text import export_text
from planish.search.exporting import export_run
from planish.search.run import Chosen, Run
from planish.search.task_note import read_task

pytestmark = pytest.mark.tvm

MakeRun = Callable[[Path, tuple[str, ...]], Path]


@pytest.fixture(scope="module")
def exported(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trial 1, moved to a folder with a space in its name after it was exported."""
    folder = tmp_path_factory.mktemp("export")
    export_run(make_run(folder / "run", ("cpu",)), None, 1, folder / "out")
    shutil.rmtree(folder / "run")
    return (folder / "out").rename(folder / "moved away")


def _stored(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    with np.load(folder / manifests.EXAMPLES, allow_pickle=False) as stored:
        return stored["inputs"], stored["outputs"]


def _lines(output: str) -> list[tuple[float, str]]:
    return [(float(value), name) for value, name in (line.split("\t") for line in output.splitlines())]


def _ranked(folder: Path, outputs: NDArray[np.float32]) -> list[str]:
    classes = manifests.read(folder).model["classes"]
    return [classes[index] for index in np.argsort(-outputs[0])]


def _leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_names_every_file_with_its_checksum(exported: Path) -> None:
    files = {p.relative_to(exported).as_posix(): p for p in exported.rglob("*") if p.is_file()}
    del files["manifest.json"]
    found = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert found == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert set(found) >= {
        "model.so", "examples.npz", "weights.safetensors", "run_model.py", "run_model.cpp", "build.sh",
        "original/model.so", "original/examples.npz", "original/manifest.json",
    }  # fmt: skip


def test_the_manifest_says_what_the_model_is_and_how_it_was_made(exported: Path) -> None:
    model = manifests.read(exported).model
    assert (model["task"], model["trial"], model["metric"], model["device"]) == ("tiny", 1, "accuracy", "cpu")
    assert model["options"] == {"0:prune": 0.25}
    assert model["metrics"]["accuracy"] == 0.88
    assert model["recipe"] == {"epochs": 6}
    assert "Grüße 猫" in model["classes"]
    how = model["preprocessing"]
    assert (how["layout"], how["input_shape"], how["stored_dtype"]) == ("NCHW", [2, 8, 8], "uint8")
    assert (how["scale"], how["mean"], how["std"]) == (1 / 255, [0.4, 0.6], [0.2, 0.3])


def test_no_path_of_this_machine_is_in_the_texts(exported: Path) -> None:
    for name in ("manifest.json", "original/manifest.json", "model.h", "build.sh", "run_model.py", "run_model.cpp"):
        assert str(exported.parent.parent) not in (exported / name).read_text(encoding="utf-8")


def test_the_original_beside_it_is_an_artifact_of_its_own(exported: Path, models: SimpleNamespace) -> None:
    manifests.read(exported / "original")
    assert (exported / "original/model.so").read_bytes() == (models.original / "model.so").read_bytes()
    assert (exported / "model.so").read_bytes() == (models.smaller / "model.so").read_bytes()


def test_the_python_program_takes_the_stored_example_raw_integers_or_floats_and_needs_no_planish(
    exported: Path, models: SimpleNamespace, tmp_path: Path
) -> None:
    inputs, outputs = _stored(exported)
    np.save(tmp_path / "raw.npy", models.task.data.validation.inputs[1].numpy())
    np.save(tmp_path / "floats.npy", inputs[2])
    program = str(exported / "run_model.py")
    # One process, because importing TVM takes seconds.
    code = (
        "import runpy, sys\n"
        "for arguments in [], ['raw.npy'], ['floats.npy']:\n"
        f"    sys.argv = [{program!r}, *arguments]\n"
        f"    runpy.run_path({program!r}, run_name='__main__')\n"
        "sys.exit(any(name.split('.')[0] == 'planish' for name in sys.modules))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    lines = _lines(done.stdout.decode())
    for index, expected in enumerate(outputs):
        part = lines[index * len(expected[0]) : (index + 1) * len(expected[0])]
        assert [name for _, name in part] == _ranked(exported, expected)
        # Six digits are printed.
        np.testing.assert_allclose([value for value, _ in part], np.sort(expected[0])[::-1], rtol=1e-4, atol=1e-5)


def test_the_cpp_program_compiles_and_gives_the_stored_outputs(exported: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    environment = {**os.environ, "PYTHON": sys.executable}
    built = subprocess.run(
        ["sh", str(exported / "build.sh")], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert built.returncode == 0, built.stderr
    program = str(exported / "run_model")
    inputs, outputs = _stored(exported)
    for x, expected in zip(inputs, outputs, strict=True):
        x.tofile(tmp_path / "in.bin")
        done = subprocess.run([program, "in.bin", "out.bin"], capture_output=True, cwd=tmp_path, check=True)
        output = np.fromfile(tmp_path / "out.bin", dtype=np.float32)
        # The manifest's tolerance for float32 models.
        assert np.abs(output - expected[0]).max() <= 1e-3 * np.abs(expected).max()
        assert [name for _, name in _lines(done.stdout.decode())] == _ranked(exported, expected)
    alone = subprocess.run([program], capture_output=True, cwd=tmp_path, check=True)
    assert [name for _, name in _lines(alone.stdout.decode())] == _ranked(exported, outputs[0])
    (tmp_path / "short.bin").write_bytes(b"1234")
    short = subprocess.run([program, "short.bin"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (short.returncode, short.stderr) == (1, "run_model: short.bin has 4 bytes; the model's input has 512\n")


def test_the_budget_of_the_run_picks_by_default_and_pick_another(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    assert export_run(run, None, None, tmp_path / "a")["trial"] == 1
    result = export_run(run, "latency<=0.3x", None, tmp_path / "b")
    assert (result["trial"], result["keeps_budget"]) == (2, True)
    assert Run(run).best("latency<=0.3x").export(tmp_path / "c") == tmp_path / "c"
    assert manifests.read(tmp_path / "c").model["trial"] == 2


def test_a_pick_that_nothing_keeps_names_the_nearest(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"latency<=0.1x \(latency\[cpu\] reaches 0.0002 and the bound is 0.0001\)"):
        export_run(run, "latency<=0.1x", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_complete_trial_may_be_named_and_the_original_has_no_original_beside_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    result = export_run(run, None, 3, tmp_path / "beaten")
    assert (result["trial"], result["keeps_budget"]) == (3, None)
    assert manifests.read(tmp_path / "beaten").model["recipe"] == {"epochs": 6}
    export_run(run, None, 0, tmp_path / "base")
    assert manifests.read(tmp_path / "base").model["recipe"] is None
    assert not (tmp_path / "base/original").exists()


@pytest.mark.parametrize(("trial", "state"), [(4, "trial 4 is stopped"), (9, "there is no trial 9")])
def test_a_trial_that_is_not_complete_is_refused_with_those_that_are(
    run: Path, tmp_path: Path, trial: int, state: str
) -> None:
    with pytest.raises(UserError, match=f"{state} in .*; complete are 0, 1, 2, 3"):
        export_run(run, None, trial, tmp_path / "out")


def test_a_run_without_a_front_exports_a_named_trial_only(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    (run / "front.json").unlink()
    with pytest.raises(UserError, match=r"front.json does not exist yet; carry on with: planish resume"):
        export_run(run, None, None, tmp_path / "out")
    export_run(run, None, 2, tmp_path / "out")
    assert manifests.read(tmp_path / "out").model["metrics"]["accuracy"] == 0.8


def test_a_moved_run_exports_as_before(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    moved = run.rename(tmp_path / "elsewhere")
    export_run(moved, None, None, tmp_path / "deep/er/out")
    assert manifests.read(tmp_path / "deep/er/out").model["trial"] == 1


def test_a_run_of_several_devices_exports_a_folder_for_each(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    run = make_run(tmp_path / "run", ("cpu", "cpu?threads=2"))
    result = export_run(run, None, None, tmp_path / "out")
    assert _leftovers(tmp_path / "out") == ["cpu", "cpu-threads-2"]
    assert [manifests.read(tmp_path / "out" / n).model["device"] for n in ("cpu", "cpu-threads-2")] == [
        "cpu", "cpu?threads=2",
    ]  # fmt: skip
    assert "for cpu?threads=2:" in export_text(result)


def test_a_used_folder_and_a_file_are_refused_and_kept(run: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"used is not empty \(it holds mine.txt\); name a new folder with --out"):
        export_run(run, None, 1, tmp_path / "used")
    with pytest.raises(UserError, match=r"mine.txt is a file; name a new folder with --out"):
        export_run(run, None, 1, tmp_path / "used/mine.txt")
    assert (tmp_path / "used/mine.txt").read_text() == "mine"


def test_an_empty_folder_is_filled_and_stays_the_same_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    out = tmp_path / "mounted"
    out.mkdir()
    before = out.stat().st_ino
    export_run(run, None, 1, out)
    assert out.stat().st_ino == before
    manifests.read(out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("out", ["/proc/x", "/dev/null/x", "x" * 300])
def test_a_place_where_no_folder_can_be_is_told_in_one_line(
    run: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    with pytest.raises(UserError, match=r"cannot (make|write) .*; (name another|free space or choose another) folder"):
        export_run(run, None, 1, Path(out))
    assert _leftovers(tmp_path) == ["run"]


def test_a_folder_that_another_process_makes_meanwhile_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(place: Path, device: object) -> float:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs.txt").write_text("theirs")
        return 0.0

    monkeypatch.setattr(exporting, "check", make)
    with pytest.raises(UserError, match="out: another process has made it meanwhile; name another folder"):
        export_run(run, None, 1, tmp_path / "out")
    assert _leftovers(tmp_path) == ["out", "run"]
    assert _leftovers(tmp_path / "out") == ["theirs.txt"]


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: the kernel then says so, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_nothing(run: Path, tmp_path: Path) -> None:
    with _largest_file(1000), pytest.raises(UserError, match=r"cannot write .*out: the file may not grow"):
        export_run(run, None, 1, tmp_path / "out")
    assert _leftovers(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the file system is read-only")]
)
def test_a_folder_that_cannot_be_written_is_told_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(number, "no", str(target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(UserError, match=f"cannot write .*out: {reason}; free space or choose another folder"):
        export_run(run, None, 1, tmp_path / "out")
    assert _leftovers(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("0001/artifact/model.so", "model.so is missing"),
        ("0000/artifact/manifest.json", r"\(no manifest.json\)"),
        ("0001/weights.safetensors", "weights.safetensors cannot be read"),
    ],
)
def test_a_missing_file_of_the_run_is_named(run: Path, tmp_path: Path, file: str, message: str) -> None:
    (run / "trials" / file).unlink()
    with pytest.raises(UserError, match=f"trial 1 cannot be exported: .*{message}"):
        export_run(run, None, 1, tmp_path / "out")
    assert _leftovers(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("file", "message"),
    [("artifact/examples.npz", "its SHA-256 differs"), ("weights.safetensors", "weights.safetensors cannot be read")],
)
def test_a_changed_file_of_the_run_is_named(run: Path, tmp_path: Path, file: str, message: str) -> None:
    path = run / "trials/0001" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=message):
        export_run(run, None, 1, tmp_path / "out")


def test_a_model_that_computes_something_else_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run / "trials/0001/artifact")
    assert main(["export", str(run), "--trial", "1", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "outputs differ from the stored ones by" in line
    assert "nothing was exported" in line
    assert _leftovers(tmp_path) == ["run"]


def spoil(artifact: Path) -> None:
    """Stored outputs, and a manifest that agrees with them, that the library does not give."""
    inputs, outputs = _stored(artifact)
    np.savez(artifact / manifests.EXAMPLES, inputs=inputs, outputs=outputs * 1.1)
    manifest = manifests._parse(artifact)
    files = {**manifest.files, manifests.EXAMPLES: manifests.digest(artifact / manifests.EXAMPLES)}
    replace(manifest, files=files).write(artifact)


def test_the_instruction_set_is_recorded_for_an_artifact_that_has_none(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    for number in (0, 1):
        artifact = run / f"trials/{number:04d}/artifact"
        replace(manifests.read(artifact), target={"kind": "llvm", "mcpu": "host"}).write(artifact)
    export_run(run, None, 1, tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "out/original"):
        assert manifests.read(folder).target == {"kind": "llvm", "mcpu": "host", **instruction_set()}


def test_a_model_for_another_cpu_is_exported_without_being_run_and_says_so(run: Path, tmp_path: Path) -> None:
    artifact = run / "trials/0001/artifact"
    replace(manifests.read(artifact), target={"kind": "llvm", "features": "avx999"}).write(artifact)
    result = export_run(run, None, 1, tmp_path / "out")
    assert "not run here, as this machine lacks: avx999" in export_text(result)
    assert manifests.read(tmp_path / "out").target["features"] == "avx999"


def test_a_run_without_a_note_of_its_task_gets_it_from_the_data(run: Path) -> None:
    from planish.search.config import load_spec

    (run / "task.json").unlink()
    note = read_task(run, load_spec(None, {"model": "digits-resnet", "data": "digits32", "budget": "latency<=0.5x"}))
    assert note.classes == tuple("0123456789")
    assert note.preprocessing["input_shape"] == [1, 32, 32]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": "x"}', '{"name": 1, "metric": 2, "preprocessing": 3, "classes": 4}']
)
def test_a_broken_note_of_the_task_is_named(run: Path, tmp_path: Path, text: str) -> None:
    (run / "task.json").write_text(text)
    with pytest.raises(UserError, match=r"task.json is no task's note"):
        export_run(run, None, 1, tmp_path / "out")


def test_the_command_tells_people_how_to_run_it_and_machines_in_json(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.00012)
    assert main(["export", str(run), "--out", str(tmp_path / "a b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'a b'}: trial 1 of {run}, keeps the run's budget"
    assert lines[1] == "accuracy 88.00 %, latency cpu 500 us (0.5x), size 1 KB"
    assert lines[2].endswith("differs by 0.00012 of the largest output, allowed are 0.001")
    assert f"  time it      planish bench '{tmp_path / 'a b'}'" in lines
    assert main(["export", str(run), "--out", str(tmp_path / "b"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["models"] == [
        {"device": "cpu", "folder": str(tmp_path / "b"), "tolerance": 0.001, "max_error": 0.00012}
    ]


def test_the_package_gives_the_function_also_after_its_file_was_imported() -> None:
    # A file called export.py would take the name's place.
    code = "from planish.search import launch, resume, export; print(export.__module__, callable(export))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["planish.search.api", "True"]


def test_chosen_exports_its_trial(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "check", lambda place, device: 0.0)
    assert Chosen(run, 2, {}, {}).export(str(tmp_path / "out")) == tmp_path / "out"
    assert manifests.read(tmp_path / "out").model["trial"] == 2


def test_a_model_for_a_device_of_the_users_own_file_is_checked_and_timed(
    make_run: Callable[[Path, tuple[str, ...]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file is not part of what is exported, and need not be there any more."""
    run = make_run(tmp_path / "run", ("cpu",))
    text = (run / "spec.toml").read_text(encoding="utf-8")
    assert text.count('device = ["cpu"]') == 1
    (run / "spec.toml").write_text(text.replace('["cpu"]', '["../gone/myboard.toml"]'), encoding="utf-8")
    for place in run.glob("trials/*/artifact"):
        replace(manifests.read(place), device="myboard").write(place)
    for file in ("front.json", "trials.jsonl"):
        path = run / file
        path.write_text(path.read_text(encoding="utf-8").replace("cpu", "myboard"), encoding="utf-8")
    out = tmp_path / "out"
    [model] = cast("list[dict[str, object]]", export_run(run, None, 1, out)["models"])
    assert "max_error" in model
    assert manifests.read(out).target["described_by"] == "myboard.toml"
    assert main(["bench", str(out), "--runs", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "myboard"


def test_weights_that_may_not_be_read_are_told_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so what the system would say is said for it."""
    opened = Path.open

    def denied(path: Path, *arguments: Any, **keys: Any) -> Any:
        if path.name == "weights.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **keys)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="Permission denied"):
        export_run(run, None, None, tmp_path / "out")


def test_the_python_program_refuses_what_is_no_sample(exported: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "turned.npy", np.zeros((8, 8, 2), np.float32))
    for name, message in (("turned", "has the shape [8, 8, 2]; it must be [2, 8, 8]"), ("none", "cannot be read")):
        command = [sys.executable, str(exported / "run_model.py"), str(tmp_path / f"{name}.npy")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_code_for_a_processor_that_is_named_has_none_of_this_machines_instructions(run: Path) -> None:
    target = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}
    found = exporting._target(replace(manifests.read(run / "trials/0001/artifact"), target=target), "board.toml")
    assert found == {**target, BY_FILE: "board.toml"}
