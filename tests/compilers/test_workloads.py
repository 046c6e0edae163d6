"""What a program is planned to call is what the compiled artifact calls; kernels and networks are timed alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planish.compilers import kernel_timer, tvm_batch
from planish.compilers.compiler import RunError
from planish.compilers.cpu.sub_batch import SubBatch
from planish.compilers.kernel_store import KernelStore
from planish.compilers.kernel_timer import KernelProtocol, time_kernels
from planish.compilers.network_timer import time_networks
from planish.compilers.runner import check, site_times
from planish.compilers.tvm_compiler import TvmCompiler
from planish.compilers.tvm_layers import layer_workloads
from planish.compilers.tvm_values import Kernel
from planish.compilers.tvm_workloads import KernelWork, Plan, plan
from planish.hwmodels.device import host, parse_device
from planish.hwmodels.measurement import MeasureProtocol
from planish.hwmodels.quiet import Samples
from planish.hwmodels.workload import Workload
from planish.spaces.layer_shapes import shape_of
from planish.spaces.quantize import Range, deploy
from planish.spaces.stages import quantised

pytestmark = pytest.mark.tvm


class Net(nn.Module):
    """Convolutions with a shortcut, a depthwise one, pooling and a dense layer: kernels of ours and of TVM's."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        y = y + torch.relu(self.point(self.deep(y)))
        y = torch.cat([y[:, :, ::2], y[:, :, 1::2]], dim=2)
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


class Shortcuts(nn.Module):
    """Residual blocks whose convolutions were taken out: what is left is one chain of elementwise steps."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2 * blocks))
        for norm in self.norms:
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.uniform_(norm.weight, 0.2, 0.4)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, second in zip(self.norms[::2], self.norms[1::2], strict=True):
            x = torch.relu(second(torch.relu(first(x))) + x)
        return x


EXAMPLE = torch.zeros(1, 3, 12, 12)


def program(module: nn.Module, example: torch.Tensor = EXAMPLE) -> Any:
    torch.manual_seed(0)
    return torch.export.export(module.eval(), (example,))


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(program(Net()), host())


def test_the_plan_calls_what_the_artifact_calls(planned: Plan, tmp_path: Path) -> None:
    artifact = TvmCompiler().compile(program(Net()), host(), tmp_path / "a", EXAMPLE[None], tolerance=1e-3)
    ours = [(kernel, site) for kernel, site in artifact.manifest.kernels]
    sites = [work.site for work in planned.calls if work.site]
    assert sites == [site for _, site in ours if site]
    assert {kernel for kernel, _ in ours} <= {work.kernel.symbol for work in planned.kernels.values()}
    assert planned.working_bytes == artifact.manifest.working_bytes > 0


def test_of_a_batch_in_parts_every_call_is_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tvm_batch, "sub_batch", lambda layers, cuts, batch, machine: SubBatch(min(cuts), 1))
    images = torch.zeros(3, 3, 12, 12)
    found = plan(program(Net(), images), host())
    artifact = TvmCompiler().compile(program(Net(), images), host(), tmp_path / "a", images[None], tolerance=1e-3)
    sites = [work.site for work in found.calls if work.site]
    assert sites == [site for _, site in artifact.manifest.kernels if site]
    assert sites == ["stem"] * 3 + ["deep", "point", "fc"]
    assert found.working_bytes == artifact.manifest.working_bytes > 0
    timed = site_times({"a": artifact.path}, host(), MeasureProtocol())["a"]
    assert [site for _, site, seconds in timed if site and seconds > 0] == sites


def test_a_plan_counts_what_the_layers_define(planned: Plan) -> None:
    macs = {work.site: work.macs for work in planned.calls if work.macs}
    pixels = 12 * 12
    assert macs == {
        "stem": 3 * 16 * 9 * pixels, "deep": 16 * 9 * pixels, "point": 16 * 16 * pixels, "fc": 160,
    }  # fmt: skip
    for work in planned.calls:
        assert work.moved_bytes > work.weight_bytes >= 0
        assert work.cycles > 0
        assert work.key() in planned.kernels


def test_layers_of_one_shape_share_a_kernel_whatever_the_model() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.second(torch.relu(self.first(x))))

    class Once(Twice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.second(x))

    example = torch.zeros(1, 16, 8, 8)
    twice, once = (plan(program(module, example), host()) for module in (Twice(), Once()))
    keys = [work.key() for work in twice.calls if work.macs]
    assert len(keys) == 2
    assert len(set(keys)) == 1
    # TVM numbers what it fuses: the same change of layout in another module is the same work, too.
    assert set(once.kernels) == set(twice.kernels)
    assert {w.kernel.symbol for w in once.kernels.values()} == {w.kernel.symbol for w in twice.kernels.values()}


def test_a_workload_of_every_kind_comes_back_from_json_with_its_key() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(3, 2, 1)
            self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.pool(self.conv(x)).flatten(2).transpose(1, 2))
            return torch.softmax(self.fc(y).mean(1), -1)

    found = plan(program(Kinds()), host())
    assert {work.op for work in found.calls} >= {"pool", "layer_norm", "softmax", "linear"}
    for work in found.calls:
        assert Workload(**json.loads(json.dumps(asdict(work)))).key() == work.key()


def test_threads_are_part_of_the_work() -> None:
    wide = nn.Conv2d(64, 64, 3, padding=1)
    one, two = (plan(program(wide, torch.zeros(1, 64, 16, 16)), parse_device(f"cpu?threads={n}")) for n in (1, 2))
    conv = [next(work for work in p.calls if work.macs) for p in (one, two)]
    assert [work.threads for work in conv] == [1, 2]
    assert conv[0].key() != conv[1].key()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    return KernelStore(tmp_path_factory.mktemp("store") / "kernels.sqlite")


FAST = KernelProtocol(runs=3, sample_s=1e-5, rounds=2)


def test_every_kernel_of_a_plan_can_be_timed_alone(planned: Plan, store: KernelStore) -> None:
    reference = max(planned.kernels.values(), key=lambda work: work.workload.macs)
    timed = time_kernels(planned.kernels, reference, host(), FAST, store=store)
    assert timed.failed == {}
    assert set(timed.samples) == set(planned.kernels)
    assert all(min(s.run_s) > 0 and len(s.run_s) == len(s.reference_s) >= 3 for s in timed.samples.values())
    assert timed.reference_s > 0


def test_a_kernel_that_meets_no_quiet_machine_is_run_more_often_in_every_process(
    planned: Plan, store: KernelStore
) -> None:
    name, work = next(iter(planned.kernels.items()))
    # Of what the reference is said to take on a quiet machine every time falls short.
    timed = time_kernels({name: work}, work, host(), FAST, 1e-12, store)
    assert len(timed.samples[name].run_s) == FAST.rounds * 4 * FAST.runs


def test_kernels_whose_processes_disagree_are_timed_in_more_of_them_the_first_ones_first(
    planned: Plan, store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, work), (other, second) = list(planned.kernels.items())[:2]
    rounds: list[list[str]] = []

    def timed(group: Any, keys: list[str], *rest: Any) -> dict[str, Samples]:
        rounds.append(list(keys))
        steady, moving = Samples((1.0,) * 4, (1.0,) * 4), Samples((1.0 + 0.1 * (len(rounds) % 2),) * 4, (1.0,) * 4)
        return {key: moving if key == name else steady for key in keys}

    monkeypatch.setattr(kernel_timer, "_round", timed)
    found = time_kernels({name: work, other: second}, work, host(), KernelProtocol(), 1.0, store)
    # Three processes settle both; one of them is not exact until it has three times as many samples.
    assert rounds == [[name, other]] * 3 + [[name]] * 6
    assert len(found.samples[name].run_s) == 36
    rounds.clear()
    time_kernels({name: work, other: second}, work, host(), KernelProtocol(), 1.0, store, limit_s=0.0)
    assert len(rounds) == 1


def test_a_kernel_that_crashes_costs_its_own_time_only(planned: Plan, store: KernelStore) -> None:
    good = max(planned.kernels.values(), key=lambda work: work.workload.macs)
    # Its output has no room: it writes where nothing is.
    crashing = KernelWork(replace(good.workload, form="bad"), _crashing(), (((4,), "float32"),))
    broken = KernelWork(
        replace(good.workload, form="worse"),
        Kernel("broken", "broken", "no such key", _unbuildable),
        (((4,), "float32"),),
    )
    works = {"good": good, "crashing": crashing, "broken": broken}
    timed = time_kernels(works, good, host(), FAST, store=store)
    assert set(timed.samples) == {"good"}
    assert "signal" in timed.failed["crashing"]
    assert "cannot be written" in timed.failed["broken"]


def test_kernels_that_do_not_end_in_time_together_are_timed_apart(planned: Plan, store: KernelStore) -> None:
    good = max(planned.kernels.values(), key=lambda work: work.workload.macs)
    endless = KernelWork(replace(good.workload, form="endless"), _storing(0, 1 << 60), (((4,), "float32"),))
    works = {**planned.kernels, "endless": endless}
    timed = time_kernels(works, good, host(), replace(FAST, time_limit_s=5.0), store=store)
    assert set(timed.samples) == set(planned.kernels)
    assert timed.failed == {"endless": "it did not end within 5 s"}


def _crashing() -> Kernel:
    return _storing(1 << 28, 1)


def _storing(place: int, times: int) -> Kernel:
    """A kernel that writes to a place of its output of four numbers, so many times."""

    def build() -> Any:
        from tvm.tirx.script import builder as T

        from planish.compilers.cpu.emit import argument, kernel

        with kernel() as (emitted, body):
            out = argument("out", (4,))

            def store() -> None:
                with T.serial(0, T.int64(times)) as turn:
                    T.buffer_store(out, T.float32(1) + out[place] * T.cast(turn, "float32"), [place])

            body(store)
        return emitted.function

    name = f"storing_{place}_{times}"
    return Kernel(name, name, f"a key of the test's own, {name}", build)


def _unbuildable() -> Any:
    raise RuntimeError("this kernel cannot be written")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        str(width): TvmCompiler()
        .compile(program(Net(width)), host(), folder / str(width), EXAMPLE[None], tolerance=1e-3)
        .path
        for width in (8, 16)
    }


QUICK = MeasureProtocol(runs=3, warmup_s=0.0)


def test_networks_are_timed_beside_a_reference(artifacts: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    timed = time_networks(
        artifacts, artifacts["8"], host(), QUICK, rounds=2, advance=lambda done, total: seen.append((done, total))
    )
    assert set(timed.samples) == set(artifacts)
    assert all(3 <= len(s.run_s) == len(s.reference_s) for s in timed.samples.values())
    assert timed.failed == {}
    assert seen
    assert all(total == 2 for _, total in seen)


def test_a_network_with_wrong_outputs_is_named_and_the_others_are_timed(
    artifacts: dict[str, Path], tmp_path: Path, spoiled: Callable[[Path, Path], Path]
) -> None:
    wrong = spoiled(artifacts["16"], tmp_path / "wrong")
    timed = time_networks({"wrong": wrong, "16": artifacts["16"]}, artifacts["8"], host(), QUICK, rounds=1)
    assert set(timed.samples) == {"16"}
    assert "outputs differ" in timed.failed["wrong"]
    with pytest.raises(RunError):
        time_networks({"16": artifacts["16"]}, wrong, host(), QUICK, rounds=1)


@pytest.fixture
def spoiled() -> Callable[[Path, Path], Path]:
    """Copies an artifact and stores outputs that it does not give, under a manifest that fits them."""
    import json
    import shutil

    import numpy as np

    from planish.compilers.manifest import EXAMPLES, NAME, digest

    def spoil(source: Path, folder: Path) -> Path:
        shutil.copytree(source, folder)
        with np.load(folder / EXAMPLES) as examples:
            inputs, outputs = examples["inputs"], examples["outputs"]
        np.savez(folder / EXAMPLES, inputs=inputs, outputs=outputs + 10 * np.abs(outputs).max())
        manifest = json.loads((folder / NAME).read_text())
        manifest["files"][EXAMPLES] = digest(folder / EXAMPLES)
        (folder / NAME).write_text(json.dumps(manifest))
        return folder

    return spoil


@pytest.mark.parametrize(
    ("option", "stored", "bits"), [(8, 8, 8), (4, 4, 8), ("bf16", 16, 16), ("w8", 8, 32), ("w4", 4, 32)]
)
def test_a_dense_layer_known_from_its_shape_reads_the_weights_that_its_program_reads(
    option: int | str, stored: int, bits: int
) -> None:
    layer = quantised(nn.Linear(1024, 1200), option, Range(-1.0, 1.0))
    (call,) = [
        work for work in plan(program(deploy(nn.Sequential(layer)), torch.zeros(1, 1024)), host()).calls if work.macs
    ]
    shape = replace(shape_of(nn.Linear(1024, 1200), (1, 1)), bits=bits, stored_bits=stored)
    (found,) = layer_workloads(host())([shape])
    assert (found.op, found.macs, found.bits, found.shapes) == (call.op, call.macs, call.bits, call.shapes)
    # Beside the weights a call has two numbers of its input, and a scale, an offset and a correction for every channel.
    assert found.weight_bytes <= call.weight_bytes <= found.weight_bytes + 3 * 4 * 1200 + 8
    assert found.cycles == pytest.approx(call.cycles, rel=0.05)


def test_a_chain_of_shortcuts_is_cut_before_what_they_repeat_grows_without_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    chain = Shortcuts(24).eval()
    inputs = torch.randn(2, 1, 16, 9, 9)
    exported = program(chain, inputs[0])
    found = plan(exported, host())
    # One expression of all would be 2**24 times as long as one block's.
    assert max(len(repr(work.kernel.subject)) for work in found.kernels.values()) < 20_000
    TvmCompiler().compile(exported, host(), tmp_path / "chain", inputs, tolerance=1e-5)
    assert check(tmp_path / "chain", host()) < 1e-5
    # More operands are more steps, and longer ones are estimated so.
    short = plan(program(Shortcuts(1), inputs[0]), host()).calls[0]
    longest = max(found.calls, key=lambda work: work.shapes["operands"])
    assert longest.shapes["operands"] > short.shapes["operands"]
    assert longest.cycles > short.cycles


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(32, 32, 3, padding=1, bias=False), 16),  # Winograd's form
        (nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), 16),
        (nn.Conv2d(32, 64, 1, bias=False), 8),
        (nn.Conv2d(32, 64, 5, 2, bias=False), 20),
    ],
)
@pytest.mark.parametrize("bits", [8, 32])
def test_a_convolution_known_from_its_shape_reads_the_weights_that_its_program_reads(
    layer: nn.Conv2d, size: int, bits: int
) -> None:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(layer.in_channels), nn.BatchNorm2d(layer.out_channels)]
    nn.init.constant_(norms[1].bias, 0.5)
    own = quantised(layer, bits, Range(0.0, 4.0)) if bits == 8 else layer
    first, last = nn.Conv2d(3, layer.in_channels, 3, padding=1), nn.Conv2d(layer.out_channels, 16, 1)
    after = quantised(last, bits, Range(0.0, 4.0)) if bits == 8 else last
    net = nn.Sequential(first, norms[0], nn.ReLU(), own, norms[1], nn.ReLU(), after).eval()
    calls = plan(program(deploy(net), torch.zeros(1, 3, size, size)), host()).calls
    (call,) = [work for work in calls if work.shapes.get("o") == layer.out_channels and work.shapes["c"] != 3]
    shape = replace(shape_of(layer, (size, size)), bits=bits, stored_bits=bits)
    (found,) = layer_workloads(host())([shape])
    # Beside them a call of bytes has two numbers of its input, and two of its output.
    assert found.weight_bytes <= call.weight_bytes <= found.weight_bytes + 16
    assert (found.op, found.macs, found.shapes) == (call.op, call.macs, call.shapes)
