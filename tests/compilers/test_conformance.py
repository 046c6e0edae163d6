"""What every compiler keeps to, whichever it is and whether its device is here or only described.

`SimulatedEngine` stands for compilers whose device nobody has: it takes `fpga/ecp5-85k`, writes an artifact, computes
its outputs with numpy in a child process and counts cycles instead of reading a clock.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from planish.compilers import manifest
from planish.compilers.artifact import Built, write_artifact
from planish.compilers.compiler import Artifact, CompileError, Compiler, RunError
from planish.compilers.manifest import EXAMPLES, ManifestError
from planish.compilers.native import NativeCompiler
from planish.compilers.registry import COMPILERS, compiler_for
from planish.compilers.tvm_compiler import TvmCompiler
from planish.hwmodels.device import Device, DeviceError, parse_device
from planish.hwmodels.measurement import Measurement, MeasureProtocol

pytestmark = pytest.mark.tvm

QUICK = MeasureProtocol(runs=3, processes=1, warmup_s=0, retries=0)
TOLERANCE = 1e-5  # float32 sums of a few dozen products, in another order


class SimulatedEngine:
    """A compiler of dense layers and ReLUs for a described FPGA, measured by simulation."""

    name = "simulated engine"
    # Runs in a process of its own, which knows the artifact's folder and nothing else.
    _SIMULATOR = """
import sys
from pathlib import Path
import numpy as np
folder = Path(sys.argv[1])
with np.load(folder / "engine.npz") as layers, np.load(folder / "examples.npz") as examples:
    worst, macs = 0.0, 0
    for x, expected in zip(examples["inputs"], examples["outputs"], strict=True):
        for number in range(int(layers["count"])):
            weight, bias = layers[f"weight{number}"], layers[f"bias{number}"]
            x = x @ weight.T + bias
            x = np.maximum(x, 0) if layers[f"relu{number}"] else x
            macs += weight.size * len(x)
        worst = max(worst, float(np.abs(x - expected).max() / np.abs(expected).max()))
    print(worst, macs // len(examples["inputs"]))
"""

    def missing(self, device: Device) -> str | None:
        return None if device.kind == "fpga" else f"the engine is no {device.kind}"

    def compile(
        self, program: ExportedProgram, device: Device, folder: Path, examples: torch.Tensor, *, tolerance: float
    ) -> Artifact:
        def build(path: Path) -> Built:
            with path.open("wb") as file:
                np.savez(file, **self._layers(program))
            return Built(working_bytes=4 * 64)

        versions = {"numpy": np.__version__}
        return write_artifact(self, "engine.npz", build, program, device, folder, examples, tolerance, versions)

    def measure(
        self, artifacts: Mapping[str, Path], device: Device, protocol: MeasureProtocol
    ) -> Mapping[str, Measurement]:
        return {name: self._measure(name, path, device, protocol) for name, path in artifacts.items()}

    def _measure(self, name: str, path: Path, device: Device, protocol: MeasureProtocol) -> Measurement:
        try:
            tolerance = manifest.read(path).tolerance
        except ManifestError as error:
            raise RunError(f"artifact {name!r}: {error}", name) from None
        command = [sys.executable, "-c", self._SIMULATOR, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"artifact {name!r} failed: {done.stderr.splitlines()[-1]}", name)
        worst, macs = map(float, done.stdout.split())
        if not worst <= tolerance:
            raise RunError(f"artifact {name!r}: outputs differ from the stored ones by {worst:.3g}", name)
        seconds = macs / max(device.macs_per_s.values())
        # Counted cycles are the same in every run.
        return Measurement(device.name, (seconds,) * (protocol.runs * protocol.processes))

    def _layers(self, program: ExportedProgram) -> dict[str, Any]:
        tensors = {**program.state_dict, **program.constants}
        names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
        found: dict[str, Any] = {}
        count = 0
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is torch.ops.aten.linear.default:
                weight, bias = (tensors[names[arg.name]].numpy(force=True) for arg in node.args[1:])
                found |= {f"weight{count}": weight, f"bias{count}": bias, f"relu{count}": np.array(False)}
                count += 1
            elif node.target is torch.ops.aten.relu.default and count:
                found[f"relu{count - 1}"] = np.array(True)
            else:
                raise CompileError(f"the engine has no unit for {node.target}")
        return {**found, "count": np.array(count)}


@dataclass(frozen=True)
class Case:
    """A compiler, a device that it can use here and one that it cannot."""

    compiler: Compiler
    device: Device
    unusable: Device


CASES: dict[str, Callable[[], Case]] = {
    "tvm": lambda: Case(TvmCompiler(), parse_device("cpu"), parse_device("cuda/sm_90")),
    "torch": lambda: Case(NativeCompiler(), parse_device("cpu"), parse_device("cpu/cortex-a72")),
    "simulated": lambda: Case(SimulatedEngine(), parse_device("fpga/ecp5-85k"), parse_device("cpu")),
}


@dataclass(frozen=True)
class Compiled:
    """A case with two models compiled once for all tests, which copy what they change."""

    case: Case
    program: ExportedProgram
    examples: torch.Tensor
    artifacts: Mapping[str, Artifact]

    def copy(self, name: str, folder: Path) -> Path:
        shutil.copytree(self.artifacts[name].path, folder / name)
        return folder / name


def exported(width: int) -> tuple[ExportedProgram, torch.Tensor]:
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, 3)).eval()
    examples = torch.randn(3, 1, 7)
    return torch.export.export(model, (examples[0],)), examples


@pytest.fixture(scope="module", params=CASES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    case, folder = CASES[request.param](), tmp_path_factory.mktemp(request.param)
    artifacts = {}
    for name, width in {"small": 5, "large": 40}.items():
        program, examples = exported(width)
        path = folder / name
        artifacts[name] = case.compiler.compile(program, case.device, path, examples, tolerance=TOLERANCE)
    return Compiled(case, program, examples, artifacts)


def test_every_compiler_of_the_registry_is_tested_here() -> None:
    assert {type(compiler) for compiler in COMPILERS} < {type(make().compiler) for make in CASES.values()}


def test_a_usable_device_lacks_nothing_and_another_is_told_why(compiled: Compiled) -> None:
    case = compiled.case
    assert case.compiler.missing(case.device) is None
    reason = case.compiler.missing(case.unusable)
    assert reason
    assert len(reason.splitlines()) == 1


def test_the_artifact_is_what_its_manifest_says(compiled: Compiled) -> None:
    artifact = compiled.artifacts["small"]
    read = manifest.read(artifact.path)
    assert read == artifact.manifest
    assert (read.compiler, read.device) == (compiled.case.compiler.name, compiled.case.device.name)
    assert (read.inputs[0].shape, read.outputs[0].shape) == ((1, 7), (1, 3))
    assert (read.inputs[0].dtype, read.outputs[0].dtype) == ("float32", "float32")
    assert set(read.files) == {read.library, EXAMPLES}
    assert read.threads == compiled.case.device.threads
    assert read.tolerance == TOLERANCE
    assert read.versions


def test_the_stored_outputs_are_torchs(compiled: Compiled) -> None:
    with np.load(compiled.artifacts["large"].path / EXAMPLES) as stored:
        np.testing.assert_array_equal(stored["inputs"], compiled.examples.numpy())
        for x, y in zip(compiled.examples, stored["outputs"], strict=True):
            np.testing.assert_array_equal(compiled.program.module()(x).numpy(force=True), y)


def test_compiling_leaves_nothing_in_the_working_folder(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    case = compiled.case
    case.compiler.compile(compiled.program, case.device, tmp_path / "a", compiled.examples, tolerance=TOLERANCE)
    assert list(Path().iterdir()) == []


def test_there_is_one_measurement_of_positive_times_for_every_artifact(compiled: Compiled) -> None:
    case = compiled.case
    paths = {name: artifact.path for name, artifact in compiled.artifacts.items()}
    measured = case.compiler.measure(paths, case.device, QUICK)
    assert list(measured) == ["small", "large"]
    for measurement in measured.values():
        assert measurement.device == case.device.name
        assert len(measurement.run_s) == QUICK.runs * QUICK.processes
        assert all(seconds > 0 and isfinite(seconds) for seconds in measurement.run_s)


def test_other_outputs_than_the_stored_ones_are_refused_with_the_artifacts_name(
    compiled: Compiled, tmp_path: Path
) -> None:
    case, folder = compiled.case, compiled.copy("large", tmp_path)
    with np.load(folder / EXAMPLES) as stored:
        inputs, outputs = stored["inputs"], stored["outputs"]
    outputs[-1, 0, 0] += 10 * TOLERANCE * np.abs(outputs[-1]).max()
    np.savez(folder / EXAMPLES, inputs=inputs, outputs=outputs)
    data = json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))
    data["files"][EXAMPLES] = manifest.digest(folder / EXAMPLES)
    (folder / manifest.NAME).write_text(json.dumps(data), encoding="utf-8")
    paths = {"good": compiled.artifacts["small"].path, "bad": folder}
    with pytest.raises(RunError, match=r"'bad'.*outputs differ") as caught:
        case.compiler.measure(paths, case.device, QUICK)
    assert caught.value.artifact == "bad"


def test_a_changed_library_is_refused_with_the_artifacts_name(compiled: Compiled, tmp_path: Path) -> None:
    case, folder = compiled.case, compiled.copy("small", tmp_path)
    library = folder / compiled.artifacts["small"].manifest.library
    library.write_bytes(library.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match=r"'changed'.*not the file that was exported") as caught:
        case.compiler.measure({"changed": folder}, case.device, QUICK)
    assert caught.value.artifact == "changed"


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(compiled: Compiled, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    case = compiled.case
    with pytest.raises(CompileError, match="not empty"):
        case.compiler.compile(compiled.program, case.device, tmp_path, compiled.examples, tolerance=TOLERANCE)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unusable_device_is_refused_with_what_is_missing(compiled: Compiled, tmp_path: Path) -> None:
    case = compiled.case
    with pytest.raises(CompileError) as caught:
        case.compiler.compile(compiled.program, case.unusable, tmp_path / "a", compiled.examples, tolerance=TOLERANCE)
    assert case.unusable.name in str(caught.value)
    assert str(case.compiler.missing(case.unusable)) in str(caught.value)
    assert not (tmp_path / "a").exists()


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(x), x


def test_a_model_of_two_outputs_is_refused_before_anything_is_written(compiled: Compiled, tmp_path: Path) -> None:
    case = compiled.case
    program = torch.export.export(Pair(), (compiled.examples[0],))
    with pytest.raises(CompileError, match="2 outputs"):
        case.compiler.compile(program, case.device, tmp_path / "a", compiled.examples, tolerance=TOLERANCE)
    assert not (tmp_path / "a").exists()


def test_a_batch_of_any_size_is_refused_before_anything_is_written(compiled: Compiled, tmp_path: Path) -> None:
    case, x = compiled.case, torch.randn(2, 7)
    program = torch.export.export(nn.Linear(7, 3), (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    with pytest.raises(CompileError, match="fixed shapes"):
        case.compiler.compile(program, case.device, tmp_path / "a", x[None], tolerance=TOLERANCE)
    assert not (tmp_path / "a").exists()


def test_a_folder_whose_compilation_did_not_end_is_no_artifact(compiled: Compiled, tmp_path: Path) -> None:
    case, folder = compiled.case, compiled.copy("small", tmp_path)
    (folder / manifest.NAME).unlink()
    with pytest.raises(RunError, match=r"'torn'.*no compiled model") as caught:
        case.compiler.measure({"torn": folder}, case.device, QUICK)
    assert caught.value.artifact == "torn"


# -- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [compiler.name for compiler in COMPILERS])
def test_the_registry_gives_the_compiler_of_that_name(name: str) -> None:
    assert compiler_for(parse_device("cpu"), name).name == name


def test_the_registry_tells_what_a_device_lacks() -> None:
    device = parse_device("cuda/sm_90")
    with pytest.raises(DeviceError, match="no schedules for cuda"):
        compiler_for(device)
    with pytest.raises(DeviceError, match="'gcc' is not known; known are tvm, torch"):
        compiler_for(parse_device("cpu"), "gcc")


def test_without_a_linker_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "apt-get install g++" in str(TvmCompiler().missing(parse_device("cpu")))
    monkeypatch.setenv("CXX", sys.executable)  # any program will do: it is not run here
    assert TvmCompiler().missing(parse_device("cpu")) is None


def test_torch_as_a_compiler_runs_quantised_models(tmp_path: Path) -> None:
    from planish.compilers import runner
    from planish.spaces import Candidate, Kind
    from planish.spaces.apply import apply
    from planish.spaces.propose import propose
    from planish.spaces.quantize import deploy
    from planish.spaces.trace import trace

    traced = trace(nn.Sequential(nn.Linear(7, 5), nn.ReLU()), torch.randn(1, 7))
    proposal = propose(traced, families=(Kind.BITS,))
    candidate = Candidate({choice.name: 8 for choice in proposal.space.choices})
    model = deploy(apply(candidate, traced, proposal, torch.randn(16, 7)))
    examples = torch.randn(2, 1, 7)
    program = torch.export.export(model, (examples[0],))
    device = parse_device("cpu")
    artifact = NativeCompiler().compile(program, device, tmp_path / "a", examples, tolerance=1e-6)
    assert runner.check(artifact.path, device) <= 1e-6
