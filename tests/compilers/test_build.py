"""What TVM is told to build for, and which models it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.compilers.compiler import CompileError
from planish.compilers.tvm_build import cpu_machine, tvm_target
from planish.compilers.tvm_compiler import TvmCompiler
from planish.hwmodels.device import host, parse_device

pytestmark = pytest.mark.tvm

Compile = Callable[..., Any]


class Net(nn.Module):
    """A forward pass given as a function of one layer and the input."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.run, self.layer = forward, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.layer, x)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_an_operation_without_a_translation_is_named_in_one_line(compile_model: Compile) -> None:
    with pytest.raises(CompileError, match=r"erfinv") as caught:
        compile_model(Net(lambda layer, x: torch.erfinv(layer(x)), nn.Linear(4, 4)), (1, 4))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (lambda layer, x: torch.add(layer(x), x, alpha=2), "alpha"),
        (lambda layer, x: F.avg_pool2d(layer(x), 2, divisor_override=3), "divisor_override"),
        (lambda layer, x: F.dropout(layer(x), 0.5, True), "dropout in training mode"),
    ],
)
def test_what_would_be_translated_wrongly_is_refused(
    forward: Callable[[nn.Module, Tensor], Tensor], named: str, compile_model: Compile
) -> None:
    with pytest.raises(CompileError, match=named):
        compile_model(Net(forward, nn.Conv2d(16, 16, 1)).eval(), (1, 16, 6, 6))


def test_a_batch_norm_in_training_mode_is_refused(compile_model: Compile) -> None:
    with pytest.raises(CompileError, match=r"training mode; call model.eval\(\)"):
        compile_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(), (2, 3, 8, 8))


def test_two_outputs_are_refused(compile_model: Compile) -> None:
    with pytest.raises(CompileError, match="2 outputs"):
        compile_model(Two(), (1, 4))


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    x = torch.randn(1, 4)
    program = torch.export.export(Sum(), (x, x))
    with pytest.raises(CompileError, match="2 inputs"):
        TvmCompiler().compile(program, host(), tmp_path / "a", x[None], tolerance=1e-3)


def test_a_batch_of_any_size_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    program = torch.export.export(nn.ReLU(), (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    with pytest.raises(CompileError, match="fixed shapes"):
        TvmCompiler().compile(program, host(), tmp_path / "a", x[None], tolerance=1e-3)


def test_a_target_that_tvm_does_not_know_is_refused() -> None:
    with pytest.raises(CompileError, match="does not know the target"):
        tvm_target(replace(parse_device("cpu"), target={"kind": "abacus"}))


@pytest.mark.parametrize(
    ("name", "lanes", "registers", "dot"),
    [
        ("cpu/x86-64-v3", 8, 16, "madd"),
        ("cpu/cascadelake?threads=4", 16, 32, "vnni"),
        ("cpu/znver4", 16, 32, "vnni"),
        ("cpu/cortex-a72", 4, 32, "widen"),
        ("cpu/cortex-a76", 4, 32, "sdot"),
    ],
)
def test_the_kernels_are_told_what_the_device_has(name: str, lanes: int, registers: int, dot: str) -> None:
    device = parse_device(name)
    machine = cpu_machine(device)
    assert (machine.lanes, machine.registers, machine.dot.name, machine.threads) == (
        lanes, registers, dot, device.threads,
    )  # fmt: skip
    assert machine.halves.name == ("bfloat16" if name == "cpu/znver4" else "halves")
    assert int(tvm_target(device).attrs["num-cores"]) == device.threads
    assert str(tvm_target(device).attrs["mcpu"]) == device.target["mcpu"]


@pytest.mark.parametrize(
    ("name", "of_bytes", "of_halves"),
    [
        ("cpu/x86-64-v3", "vpmaddwd", "vfmadd231ps"),
        ("cpu/cascadelake", "vpdpbusd", "vfmadd231ps"),
        ("cpu/znver4", "vpdpbusd", "vdpbf16ps"),
        ("cpu/cortex-a72", "smlal", "fmla"),
        ("cpu/cortex-a76", "sdot", "fmla"),
    ],
)
def test_every_form_of_convolution_compiles_for_every_described_cpu(name: str, of_bytes: str, of_halves: str) -> None:
    import tvm

    from planish.compilers.cpu.convspec import ConvSpec, Step
    from planish.compilers.cpu.kernels import conv_kernel
    from planish.compilers.cpu.tiles import Tile, WinogradTile, choices

    device = parse_device(name)
    machine, target = cpu_machine(device), tvm_target(device)
    lanes = machine.lanes
    floats = (Step("bias"), Step("relu"))
    for dot, last, instruction in (
        (None, (), ""),
        (machine.dot, (Step("scale"), Step("quantize")), of_bytes),
        (machine.halves, (Step("bfloat16"),), of_halves),
    ):
        steps = (*floats, *last)
        spec = ConvSpec(
            1, 32, 8, 8, 32, (3, 3), padding=(1, 1, 1, 1), lanes=lanes, in_lanes=lanes, dot=dot, steps=steps
        )  # fmt: skip
        found = choices(spec, machine, largest_sum=2**20)
        for kind in (Tile, WinogradTile):
            choice = next((c for c in found if isinstance(c, kind)), None)
            if choice is None:
                assert dot == machine.halves
                continue
            function = conv_kernel(spec, choice, machine).with_attr("global_symbol", "main")
            assembly = tvm.compile(tvm.IRModule({"main": function}), target).mod.inspect_source("asm")
            assert "planish_pairs" not in assembly, "what LLVM did not put in its place is called for every vector"
            if kind is Tile:
                assert instruction in assembly
