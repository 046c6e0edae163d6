"""Compiled code that crashes, hangs, lies or is not what was exported costs one request, and is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.compilers.faulty import library, seal
from torch import nn

from planish.compilers import child, manifest, runner
from planish.compilers.compiler import RunError
from planish.compilers.manifest import EXAMPLES, Manifest, digest
from planish.compilers.runner import ChildResult
from planish.compilers.tvm_compiler import TvmCompiler
from planish.hwmodels.device import host
from planish.hwmodels.measurement import MeasureProtocol

pytestmark = pytest.mark.tvm

QUICK = MeasureProtocol(runs=3, processes=1, warmup_s=0, retries=0)
Array = NDArray[Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact without a fault."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)).eval()
    examples = torch.randn(2, 1, 3, 6, 6)
    program = torch.export.export(model, (examples[0],))
    folder = tmp_path_factory.mktemp("good") / "artifact"
    return TvmCompiler().compile(program, host(), folder, examples, tolerance=1e-5).path


@pytest.mark.parametrize(("quiet_s", "runs"), [(0.0, 3), (60.0, 3), (1e-12, 12)])
def test_what_meets_no_quiet_machine_is_run_more_often_and_the_reference_beside_it(
    quiet_s: float, runs: int, good: Path
) -> None:
    found = runner.run_child({"reference": good, "other": good}, host(), QUICK, quiet_s=quiet_s)
    assert [len(found.run_s["other"]), len(found.reference_s["other"])] == [runs, runs]
    assert len(found.run_s["reference"]) >= 3
    assert len(runner.run_child({"reference": good}, host(), QUICK, quiet_s=quiet_s).run_s["reference"]) == 3


# -- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "a segmentation fault": ("*(volatile int*)8 = 1;", "crashed with signal 11"),
    "an abort": ("std::abort();", "crashed with signal 6"),
    "an exit that says all is well": ("_exit(0);", "ended its process before"),
    "an exit": ("_exit(7);", "failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_loading_is_that_artifacts(fault: str, good: Path, tmp_path: Path) -> None:
    body, message = FAULTS[fault]
    with pytest.raises(RunError, match=f"'faulty' {message}") as caught:
        runner.measure({"good": good, "faulty": library(tmp_path / "a", body)}, host(), QUICK)
    assert caught.value.artifact == "faulty"


def test_code_that_never_ends_is_killed_and_named(tmp_path: Path) -> None:
    endless = library(tmp_path / "a", "for (;;) pause();")
    protocol = replace(QUICK, time_limit_s=3)
    with pytest.raises(RunError, match="'endless' did not end within 3 s and was killed; raise time_limit_s") as caught:
        runner.measure({"endless": endless}, host(), protocol)
    assert caught.value.artifact == "endless"


def test_what_compiled_code_prints_reaches_neither_the_parent_nor_the_name_of_the_culprit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = r'printf("noise\n\xff"); fflush(stdout); fprintf(stderr, "more\xff"); fflush(stderr); std::abort();'
    with pytest.raises(RunError) as caught:
        runner.check(library(tmp_path / "a", body), host())
    assert caught.value.artifact == "artifact"
    assert capfd.readouterr() == ("", "")


def test_bytes_that_are_no_library_fail_with_a_reason(tmp_path: Path) -> None:
    for compiler, reason in (("tvm", ".*Failed to load"), ("torch", "BadZipFile")):
        folder = tmp_path / compiler
        folder.mkdir()
        (folder / "model.so").write_bytes(b"not a library")
        np.savez(folder / EXAMPLES, inputs=np.zeros((1, 2)), outputs=np.zeros((1, 2)))
        with pytest.raises(RunError, match=f"'artifact' failed: {reason}") as caught:
            runner.check(seal(folder, compiler), host())
        assert caught.value.artifact == "artifact"


def test_a_failure_without_a_reason_is_told_by_its_kind(good: Path, tmp_path: Path) -> None:
    code = """
import sys
from planish.compilers import child
def load(folder, manifest):
    raise AssertionError
child.LOADERS = {"tvm": load}
sys.exit(child.main(*sys.argv[1:]))
"""
    request = tmp_path / "request.json"
    request.write_text(
        json.dumps({"artifacts": {"a": str(good)}, "runs": 0, "quiet_s": 0, "warmup_s": 0, "kernels": False, "rpc": ""})
    )
    command = [sys.executable, "-c", code, str(request), str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == child.EXIT_FAILED
    assert (done.stdout, done.stderr) == ("a\n", "AssertionError: no reason given\n")


# -- what is not what was exported ------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))
        change(data)
        (folder / manifest.NAME).write_text(json.dumps(data), encoding="utf-8")

    return edit


def outputs(change: Callable[[Array], Array]) -> Callable[[Path], None]:
    """Stores other outputs, under a checksum that is right."""

    def edit(folder: Path) -> None:
        with np.load(folder / EXAMPLES) as stored:
            inputs, values = stored["inputs"], stored["outputs"]
        np.savez(folder / EXAMPLES, inputs=inputs, outputs=change(values))
        edited(lambda data: data["files"].update({EXAMPLES: digest(folder / EXAMPLES)}))(folder)

    return edit


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / manifest.NAME).unlink(), "no compiled model"),
    "no library": (lambda folder: (folder / "model.so").unlink(), "is missing"),
    "no examples": (lambda folder: (folder / EXAMPLES).unlink(), "is missing"),
    "a changed library": (lambda folder: (folder / "model.so").write_bytes(b"x"), "SHA-256 differs"),
    "changed examples": (lambda folder: (folder / EXAMPLES).write_bytes(b"x"), "SHA-256 differs"),
    "a file elsewhere": (edited(lambda data: data["files"].update({"../x": "0"})), "not inside the folder"),
    "a library elsewhere": (edited(lambda data: data.update(library="/lib/libc.so")), "no checksum"),
    "another compiler": (edited(lambda data: data.update(compiler="gcc")), "needs the compiler 'gcc'"),
    "other outputs": (outputs(lambda y: y + 1), "outputs differ"),
    "outputs of another shape": (outputs(lambda y: y[..., :-1]), r"the shape \(1, 5\); \(1, 4\) was stored"),
    "outputs that are not finite": (outputs(lambda y: y * np.nan), "outputs differ"),
    "one output that is not finite": (outputs(lambda y: np.where(y == y.flat[-1], np.inf, y)), "outputs differ"),
    "fewer outputs": (outputs(lambda y: y[:1]), " failed: ValueError"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_artifact_that_is_not_what_was_exported_is_refused_and_named(
    change: str, good: Path, tmp_path: Path
) -> None:
    edit, message = CHANGES[change]
    folder = tmp_path / "copy"
    shutil.copytree(good, folder)
    edit(folder)
    pattern = message if message.startswith(" failed") else f": .*{message}"
    with pytest.raises(RunError, match=f"artifact 'artifact'{pattern}") as caught:
        runner.check(folder, host())
    assert caught.value.artifact == "artifact"
    assert len(str(caught.value).splitlines()) == 1


# -- the comparison itself --------------------------------------------------------------------------------------------


class Model:
    """A compiled model as a function."""

    def __init__(self, run: Callable[[Array], Array], tolerance: float = 0.01) -> None:
        self.run = run
        self.manifest = Manifest("", "", "", {}, 1, (), (), tolerance, {})

    def time(self, number: int) -> float:
        return 1e-6 * number

    def kernels(self, x: Array, repeats: int) -> list[tuple[str, float]]:
        return []


def stored(folder: Path, inputs: Array, values: Array) -> Path:
    np.savez(folder / EXAMPLES, inputs=inputs, outputs=values)
    return folder


X = np.arange(6, dtype=np.float32).reshape(3, 1, 2)


def test_the_difference_is_relative_to_the_largest_output(tmp_path: Path) -> None:
    stored(tmp_path, X, 100 * X + 1)
    # Examples of the largest outputs 101, 301 and 501: off by one each.
    assert child.check(Model(lambda x: 100 * x), tmp_path) == pytest.approx(1 / 101)
    with pytest.raises(child.WrongOutput, match=r"by 0\.0099 of"):
        child.check(Model(lambda x: 100 * x, tolerance=0.0098), tmp_path)


def test_a_result_that_depends_on_what_ran_before_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, X, X)
    calls = []

    def run(x: Array) -> Array:
        calls.append(x)
        return x if len(calls) <= 3 else x + 1

    with pytest.raises(child.WrongOutput):
        child.check(Model(run), tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_is_refused_in_any_example(tmp_path: Path, bad: float) -> None:
    stored(tmp_path, X, X)
    for first in X[:, 0, 0]:

        def run(x: Array, first: float = first) -> Array:
            return np.where(x == first, bad, x)

        with pytest.raises(child.WrongOutput):
            child.check(Model(run), tmp_path)


def test_bytes_do_not_wrap_around_in_the_comparison(tmp_path: Path) -> None:
    values = np.full((3, 1, 2), 255, np.uint8)
    stored(tmp_path, X, values)
    with pytest.raises(child.WrongOutput, match="differ from the stored ones by 1 "):
        child.check(Model(lambda x: np.zeros((1, 2), np.uint8)), tmp_path)


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_s", "before"),
    # 2 ms of short runs, eight of longer ones, and one of what fills a sample by itself.
    [(10e-6, 200), (250e-6, 8), (700e-6, 8), (2.5e-3, 8), (5e-3, 1), (1.0, 1)],
)
def test_weights_are_back_in_the_caches_before_a_sample(run_s: float, before: int) -> None:
    assert child._runs_before(max(1, round(5e-3 / run_s))) == before


def test_a_device_is_held_by_one_process_at_a_time() -> None:
    code = """
import fcntl
real = fcntl.flock
fcntl.flock = lambda file, operation: real(file, operation | fcntl.LOCK_NB)
from planish.compilers.runner import device_lock
from planish.hwmodels.device import parse_device
for name in ("cpu", "cpu?threads=1", "cuda/sm_90"):
    try:
        with device_lock(parse_device(name)):
            print("free")
    except BlockingIOError:
        print("held")
"""

    def others() -> list[str]:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    with runner.device_lock(replace(host(), name="cpu?threads=2", threads=2)):
        assert others() == ["held", "held", "free"]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[float]]], list[list[str]]]:
    """Replaces child processes by given times of the artifact `a`; returns the names that each was asked for."""

    def script(times: list[list[float]]) -> list[list[str]]:
        asked: list[list[str]] = []

        def run_child(artifacts: Mapping[str, Path], *_: object, **__: object) -> ChildResult:
            asked.append(list(artifacts))
            return ChildResult({"a": times[len(asked) - 1], "b": [5.0] * 3}, {}, {})

        monkeypatch.setattr(runner, "run_child", run_child)
        monkeypatch.setattr(runner, "device_lock", lambda device: nullcontext())
        return asked

    return script


TWO = {"a": Path("a"), "b": Path("b")}


def test_the_runs_of_all_processes_make_one_measurement(scripted: Callable[..., list[list[str]]]) -> None:
    asked = scripted([[1.0] * 3, [1.01] * 3])
    measured = runner.measure(TWO, host(), MeasureProtocol(runs=3, processes=2, drift=0.03))
    assert asked == [["a", "b"]] * 2
    assert measured["a"].run_s == (1.0, 1.0, 1.0, 1.01, 1.01, 1.01)
    assert measured["b"].run_s == (5.0,) * 6
    assert [found.processes for found in measured.values()] == [2, 2]
    assert not measured["a"].drifted


def test_power_is_the_mean_of_the_processes_that_could_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    powers = iter([{"a": 10.0, "b": None}, {"a": 14.0, "b": None}])

    def run_child(*_: object, **__: object) -> ChildResult:
        return ChildResult({"a": [2.0] * 3, "b": [5.0] * 3}, {}, {}, {}, next(powers))

    monkeypatch.setattr(runner, "run_child", run_child)
    monkeypatch.setattr(runner, "device_lock", lambda device: nullcontext())
    measured = runner.measure(TWO, host(), MeasureProtocol(runs=3, processes=2))
    assert (measured["a"].watts, measured["a"].energy_j) == (12.0, 24.0)
    assert (measured["b"].watts, measured["b"].energy_j) == (None, None)


def test_a_round_in_which_the_reference_drifted_is_measured_again(scripted: Callable[..., list[list[str]]]) -> None:
    asked = scripted([[1.0] * 3, [1.5] * 3, [2.0] * 3, [2.0] * 3])
    measured = runner.measure(TWO, host(), MeasureProtocol(runs=3, processes=2, drift=0.03, retries=2))
    assert len(asked) == 4
    assert measured["a"].run_s == (2.0,) * 6
    assert not measured["a"].drifted


def test_drift_that_never_stops_is_reported_with_every_measurement(scripted: Callable[..., list[list[str]]]) -> None:
    asked = scripted([[1.0] * 3, [1.5] * 3] * 3)
    measured = runner.measure(TWO, host(), MeasureProtocol(runs=3, processes=2, drift=0.03, retries=2))
    assert len(asked) == 6
    assert measured["a"].drifted
    assert measured["b"].drifted


def test_drift_is_the_change_between_the_first_and_the_last_third() -> None:
    assert runner.drift([1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 2.0, 2.0, 2.0]) == 1.0
    assert runner.drift([2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0]) == 1.0
    assert runner.drift([3.0]) == 0.0


def test_every_kernel_call_is_timed_under_its_layers_name(good: Path) -> None:
    rows = runner.site_times({"net": good}, host(), QUICK)["net"]
    assert [site for _, site, _ in rows if site] == ["0", "4"]
    assert any(kernel.startswith("pool") for kernel, _, _ in rows)
    assert all(seconds > 0 for _, _, seconds in rows)


def test_the_child_is_told_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, good: Path) -> None:
    seen: dict[str, Any] = {}

    def run(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        seen.update(named["env"])
        return subprocess.CompletedProcess(command, 1, "", "stopped")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RunError, match="stopped") as caught:
        runner.check(good, replace(host(), threads=3))
    assert caught.value.artifact is None  # it ended before it named one
    assert [seen[name] for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS")] == ["3", "3"]
    assert seen["TVM_USE_RUNTIME_LIB"] == "1"
