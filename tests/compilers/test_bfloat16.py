"""Kernels of bfloat16 against torch in float64, on numbers whose sums float32 holds exactly (see test_conv.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.compilers.test_conv import apply_steps, direct, pairs, specs, tiles
from torch import Tensor, nn

from planish.compilers.cpu import packing
from planish.compilers.cpu.convspec import BUFFER_STEPS, EXPONENTIAL_STEPS, ConvSpec, Step
from planish.compilers.cpu.dense import DenseSpec, dense
from planish.compilers.cpu.epilogue import quantize_numbers
from planish.compilers.cpu.machine import DOTS, Machine
from planish.compilers.cpu.packing import dense_dot, per_channel
from planish.compilers.cpu.tiles import plain_lanes
from planish.hwmodels.device import host, parse_device
from planish.spaces.bfloat16 import Bfloat16
from planish.spaces.quantize import Quantized, Range, deploy

Array = NDArray[Any]
Run = Callable[..., Array]
Compile = Callable[..., Any]

pytestmark = pytest.mark.tvm

HALVES = [(DOTS["halves"], lanes) for lanes in (4, 8, 16)]
HALVES += [(DOTS["bfloat16"], 16)] if "avx512_bf16" in host().features else []
ROUND = Step("bfloat16")


def rounded(x: Array) -> Array:
    """The nearest bfloat16 by torch, as float64."""
    return torch.from_numpy(x.astype(np.float32)).bfloat16().double().numpy()


def values_of(bits: Array) -> Array:
    """The numbers of bfloat16's bits: those of float32 without its lower half."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@st.composite
def convolutions(draw: st.DrawFn) -> ConvSpec:
    """Those of test_conv.py without a depthwise form, of bfloat16, that read float32 or bfloat16 and write either."""
    dot, lanes = draw(st.sampled_from(HALVES))
    form = draw(st.sampled_from(["plain", "blocked", "grouped"]))
    spec = draw(specs(form).filter(lambda spec: spec.lanes == lanes))
    in_lanes = lanes
    if form == "plain":
        in_lanes = draw(st.sampled_from([1, 2])) if spec.dilation[1] == 1 else 2
    steps = tuple(step for step in spec.steps if step.op != "quantize")
    steps = (*steps, *draw(st.sampled_from([(), (ROUND,), (Step("quantize"),)])))
    return replace(spec, dot=dot, in_lanes=in_lanes, quantize=draw(st.booleans()), steps=steps)


def check(spec: ConvSpec, layout: Any, run: Run, choice: Any = None, seed: int = 0) -> None:
    from planish.compilers.cpu.kernels import conv_kernel, conv_weights

    choice, rng = choice or direct(spec), np.random.default_rng(seed)
    weight = rng.integers(-3, 4, (spec.o, spec.c // spec.groups, *spec.kernel)).astype(np.float32)
    # 10 bits, of which bfloat16 keeps 8: many lie half way between two of its numbers.
    data = (rng.integers(-511, 512, (spec.n, spec.c, spec.h, spec.w)) / 8).astype(np.float32)
    top, left, bottom, right = spec.padding
    framed = F.pad(torch.from_numpy(rounded(data)), (left, right, top, bottom))
    stride, dilation = spec.stride, spec.dilation
    total = F.conv2d(framed, torch.from_numpy(weight).double(), None, stride, 0, dilation, spec.groups)
    extra, arguments = [], []
    for step in spec.steps:
        if step.op in ("scale", "bias"):
            values = rng.choice([-0.5, 0.25, 1, 2], spec.o)
            extra.append(values.reshape(-1, 1, 1))
            arguments.append(per_channel(values, spec.out_blocks, spec.lanes))
        elif step.op == "quantize":
            arguments.append(quantize_numbers(0.25, 7))
        elif step.op in BUFFER_STEPS:
            values = rng.choice([-2, -1, 0, 1, 2], total.shape).astype(np.float32)
            extra.append(values)
            arguments.append(layout.block(values, spec.lanes, fill=5))
    last = ROUND in spec.steps
    expected = apply_steps(replace(spec, steps=tuple(step for step in spec.steps if step is not ROUND)), total, extra)
    given = data if spec.quantize else packing.bfloat16(data)
    packed = given if spec.in_lanes != spec.lanes else layout.block(given, spec.lanes, fill=9)
    weights = conv_weights(spec, choice, pairs(spec), packing.bfloat16(weight))
    shape = (spec.n, spec.out_blocks, spec.oh, spec.ow, spec.lanes)
    found = run(conv_kernel(spec, choice, pairs(spec)), [packed, *weights, *arguments], shape, spec.out_dtype)
    result = layout.unblock(found, spec.o)
    exact = not any(step.op in EXPONENTIAL_STEPS or step.op.startswith("hard") for step in spec.steps)
    if last:
        assert result.dtype == np.uint16
        result, expected = values_of(result), rounded(expected)
    scale = max(1.0, float(np.abs(expected).max()))
    if exact:
        np.testing.assert_array_equal(result, expected)
    else:  # float32 may lie on the other side of a boundary between two numbers
        tolerance = 1 if spec.out_dtype == "uint8" else 2**-7 * scale if last else 2e-6 * scale
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(spec=convolutions(), seed=st.integers(0, 99))
def test_convolutions_equal_torch(layout: Any, run_kernel: Run, spec: ConvSpec, seed: int) -> None:
    check(spec, layout, run_kernel, seed=seed)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_every_tile_gives_the_same_result(layout: Any, run_kernel: Run, data: st.DataObject, seed: int) -> None:
    spec = data.draw(convolutions())
    check(spec, layout, run_kernel, data.draw(tiles(spec)), seed)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_products_over_all_pixels_equal_torch(layout: Any, run_kernel: Run, data: st.DataObject, seed: int) -> None:
    drawn = data.draw(convolutions().filter(lambda spec: spec.in_lanes == spec.lanes))
    spec = replace(drawn, kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0))
    assert spec.flat
    check(spec, layout, run_kernel, data.draw(tiles(spec)), seed)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_dense_layers_equal_torch(run_kernel: Run, data: st.DataObject, seed: int) -> None:
    dot, lanes = data.draw(st.sampled_from(HALVES))
    steps = data.draw(st.sampled_from([(), (Step("bias"), Step("relu")), (Step("bias"), ROUND)]))
    spec = DenseSpec(
        m=data.draw(st.integers(1, 13)), k=data.draw(st.integers(1, 37)), o=data.draw(st.integers(1, 70)), lanes=lanes,
        dot=dot, quantize=data.draw(st.booleans()), steps=steps, threads=data.draw(st.sampled_from([1, 1, 2])),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    weight = rng.integers(-3, 4, (spec.o, spec.k)).astype(np.float32)
    x = (rng.integers(-511, 512, (spec.m, spec.k)) / 8).astype(np.float32)
    want, arguments = rounded(x) @ weight.T.astype(np.float64), []
    if spec.steps:
        bias = rng.choice([-0.5, 0.25, 1, 2], spec.o)
        want, arguments = want + bias, [per_channel(bias, spec.out_blocks, lanes)]
    want = np.maximum(want, 0) if Step("relu") in spec.steps else rounded(want) if ROUND in spec.steps else want
    given = x if spec.quantize else packing.bfloat16(x)
    packed = dense_dot(packing.bfloat16(weight), 0, lanes, dot)
    dtype = "uint16" if ROUND in spec.steps else "float32"
    found = run_kernel(dense(spec, Machine(lanes, 32)), [given, *packed, *arguments], (spec.m, spec.o), dtype)
    np.testing.assert_array_equal(values_of(found) if ROUND in spec.steps else found, want)


def test_a_kernel_rounds_as_torch_does(run_kernel: Run) -> None:
    numbers = [0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, 1e-40, np.inf, -np.inf, np.nan]
    x = np.array(numbers, np.float32)[:, None]
    spec = DenseSpec(m=len(x), k=1, o=8, lanes=8, steps=(ROUND,))
    one = packing.dense_float(np.ones((8, 1), np.float32), 8)
    found = run_kernel(dense(spec, Machine(8, 16)), [x, one], (len(x), 8), "uint16")
    want = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(values_of(found), np.repeat(want.double().numpy(), 8, 1))


@settings(max_examples=50, derandomize=True)
@given(st.integers(0, 999))
def test_weights_are_rounded_as_torch_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, 64, dtype=np.uint32) & rng.choice([0xFFFFFFFF, 0xFFFF8000, 0xFFFF0000], 64)
    x = bits.astype(np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    np.testing.assert_array_equal(values_of(packing.bfloat16(x)), rounded(x))


def test_few_channels_are_taken_in_pairs_or_their_columns_are() -> None:
    dot, machine = DOTS["halves"], Machine(8, 16)
    assert plain_lanes(2, (3, 3), (1, 1), dot, machine) == 2
    assert plain_lanes(1, (3, 4), (1, 1), dot, machine) == 1, "a single channel would be half a pair"
    assert plain_lanes(1, (3, 4), (1, 2), dot, machine) == 2, "columns that are apart make no pairs"


class Mixed(nn.Module):
    """Layers of bfloat16, bytes and float32 that read each other, a shortcut, a batch norm, groups and a pool."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        seen = Range(-3.0, 3.0)
        self.first = Bfloat16(nn.Conv2d(3, 24, 3, padding=1))
        self.a = Bfloat16(nn.Conv2d(24, 24, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(24)
        self.norm.running_var.fill_(2.0)  # type: ignore[union-attr]
        self.b = Bfloat16(nn.Conv2d(24, 24, 1))
        self.grouped = Bfloat16(nn.Conv2d(24, 24, 3, padding=1, groups=4))
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.bytes = Quantized(nn.Conv2d(24, 20, 3, stride=2), 8, seen)
        self.after = Bfloat16(nn.Conv2d(20, 20, 3, stride=2, padding=1, dilation=2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden, self.last = Bfloat16(nn.Linear(20, 33)), Bfloat16(nn.Linear(33, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (self.b(self.norm(self.a(x)).relu()) + x).relu()
        x = self.depthwise(self.grouped(F.pad(x, (1, 0, 0, 2))))
        x = self.after(self.bytes(x).relu()).relu()
        return self.last(F.gelu(self.hidden(self.pool(x).flatten(1))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("threads", [1, min(2, os.cpu_count() or 1)])
def test_a_model_of_several_kinds_of_numbers_runs(threads: int, compile_model: Compile, difference: Compile) -> None:
    device = parse_device(f"cpu?threads={threads}")
    artifact = compile_model(deploy(Mixed().eval()), (2, 3, 21, 19), device, tolerance=0.05)
    assert difference(artifact, device) <= artifact.manifest.tolerance
    names = [name.partition("_")[0] for name, _ in artifact.manifest.kernels]
    wanted = ["bconv3x3", "bconv3x3", "bconv1x1", "bconv3x3", "depthwise3x3", "qconv3x3", "bconv3x3"]
    assert names[:-3] == wanted
    assert names[-2:] == ["bdense", "bdense"]
    # What only a layer of bfloat16 reads is rounded by the kernel that computes it.
    assert "relu_bfloat16" in artifact.manifest.kernels[1][0]


def test_a_plan_counts_two_bytes_a_weight() -> None:
    from planish.compilers.tvm_workloads import plan

    model = deploy(nn.Sequential(Bfloat16(nn.Conv2d(32, 64, 3)), nn.ReLU(), Bfloat16(nn.Conv2d(64, 32, 1))).eval())
    found = plan(torch.export.export(model, (torch.zeros(1, 32, 9, 9),)), host())
    first, second = (work for work in found.calls if work.op == "conv2d")
    assert first.bits == second.bits == 16
    assert first.weight_bytes == 2 * 32 * 64 * 9 + 4 * 64
    # Float32 comes in; between the two are two bytes a value.
    assert first.moved_bytes == first.weight_bytes + 4 * 32 * 81 + 2 * 64 * 49


def test_its_kernels_are_timed_alone(tmp_path: Path) -> None:
    from planish.compilers.kernel_store import KernelStore
    from planish.compilers.kernel_timer import KernelProtocol, time_kernels
    from planish.compilers.tvm_workloads import plan

    model = deploy(nn.Sequential(Bfloat16(nn.Conv2d(16, 16, 3)), Bfloat16(nn.Conv2d(16, 8, 1))).eval())
    works = plan(torch.export.export(model, (torch.zeros(1, 16, 9, 9),)), host()).kernels
    reads = [kind for work in works.values() for _, kind in work.arguments if work.workload.bits == 16]
    assert "uint16" in reads
    protocol = KernelProtocol(runs=3, sample_s=1e-5, rounds=2)
    timed = time_kernels(works, next(iter(works.values())), host(), protocol, store=KernelStore(tmp_path / "k.sqlite"))
    assert timed.failed == {}
    assert set(timed.samples) == set(works)
