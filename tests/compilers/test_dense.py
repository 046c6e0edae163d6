"""The CPU's dense kernels against torch in float64, on whole numbers that float32 sums exactly (see test_conv.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.compilers.byte_dots import HERE, largest_weight

from planish.compilers.cpu.convspec import Step
from planish.compilers.cpu.dense import DenseSpec, dense
from planish.compilers.cpu.epilogue import quantize_numbers
from planish.compilers.cpu.machine import DOTS, Machine
from planish.compilers.cpu.packing import dense_dot, dense_float, dense_nibbles, dense_whole, per_channel

Array = NDArray[Any]
Run = Callable[..., Array]

pytestmark = pytest.mark.tvm

AFFINE = (Step("scale"), Step("bias"))
TAILS = [(), (Step("relu"),), (Step("clip", (-1.0, 6.0)),), (Step("relu"), Step("quantize"))]


@st.composite
def specs(draw: st.DrawFn, int8: bool = False) -> DenseSpec:
    dot, lanes = draw(st.sampled_from(HERE if int8 else [(None, 4), (None, 8), (None, 16)]))
    return DenseSpec(
        m=draw(st.integers(1, 13)),
        k=draw(st.integers(1, 37)),
        o=draw(st.integers(1, 70)),
        lanes=lanes,
        dot=dot,
        quantize=int8 and draw(st.booleans()),
        steps=((*AFFINE,) if int8 else draw(st.sampled_from([(), AFFINE]))) + draw(st.sampled_from(TAILS)),
        threads=draw(st.sampled_from([1, 1, 2])),
    )


@st.composite
def nibbles(draw: st.DrawFn) -> DenseSpec:
    spec = draw(specs(int8=True).filter(lambda spec: spec.dot is not None and spec.dot.data != "int16"))
    assert spec.dot is not None
    together = draw(st.sampled_from([1, 4, 8])) if spec.dot.name == "bytes" else 1
    return replace(spec, k=draw(st.integers(1, 150)), dot=replace(spec.dot, together=together), nibbles=True)


@st.composite
def weights_alone(draw: st.DrawFn) -> DenseSpec:
    spec, bits = draw(specs()), draw(st.sampled_from([8, 4]))
    k = 8 * draw(st.integers(1, 12)) if bits == 4 else draw(st.integers(1, 80))
    return replace(spec, k=k, weight_bits=bits)


def check(spec: DenseSpec, run: Run, seed: int) -> None:
    """Runs the kernel of a spec on random data and compares it with torch."""
    rng = np.random.default_rng(seed)
    zero_point = int(rng.choice([0, 7, 255])) if spec.int8 else 0
    if spec.int8:
        assert spec.dot is not None
        most = 7 if spec.nibbles else largest_weight(spec.dot)
        weight = rng.integers(-most, min(most, 127) + 1, (spec.o, spec.k)).astype(np.int8)
        data = rng.choice([0, 1, zero_point, 254, 255], (spec.m, spec.k)).astype(np.uint8)
        if spec.quantize:
            data = (rng.integers(-300, 300, data.shape) / 8).astype(np.float32)
    else:
        most = {32: 3, 8: 127, 4: 7}[spec.weight_bits]
        weight = rng.integers(-most, most + 1, (spec.o, spec.k)).astype(np.float32)
        data = rng.integers(-4, 5, (spec.m, spec.k)).astype(np.float32)
    seen = torch.from_numpy(data).double()
    if spec.quantize:
        seen = torch.clamp(torch.round(seen / 0.25) + zero_point, 0, 255)
    value = (seen - zero_point) @ torch.from_numpy(weight).double().T
    arguments = []
    for step in spec.steps:
        if step.op in ("scale", "bias"):
            array = rng.choice([-0.5, 0.25, 1, 2], spec.o) * (2.0**-12 if spec.int8 and step.op == "scale" else 1)
            value = value * torch.from_numpy(array) if step.op == "scale" else value + torch.from_numpy(array)
            arguments.append(per_channel(array, spec.out_blocks, spec.lanes))
        elif step.op == "relu":
            value = value.relu()
        elif step.op == "clip":
            value = value.clamp(*step.values)
        else:
            value = torch.clamp(torch.round(value / 0.25) + 7, 0, 255)
            arguments.append(quantize_numbers(0.25, 7))
    if spec.dot:
        packed = (dense_nibbles if spec.nibbles else dense_dot)(weight, zero_point, spec.lanes, spec.dot)
    elif spec.weight_bits < 32:
        packed = [dense_whole(weight.astype(np.int8), spec.lanes, spec.weight_bits)]
    else:
        packed = [dense_float(weight, spec.lanes)]
    numbers = [quantize_numbers(0.25, zero_point)] if spec.int8 else []
    dtype = "uint8" if spec.steps and spec.steps[-1].op == "quantize" else "float32"
    output = run(dense(spec, Machine(spec.lanes, 32)), [data, *numbers, *packed, *arguments], (spec.m, spec.o), dtype)
    np.testing.assert_array_equal(output, value.numpy())


@settings(max_examples=25, derandomize=True, deadline=None)
@given(spec=specs(), seed=st.integers(0, 99))
def test_float_products_equal_torch(run_kernel: Run, spec: DenseSpec, seed: int) -> None:
    check(spec, run_kernel, seed)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(spec=specs(int8=True), seed=st.integers(0, 99))
def test_int8_products_equal_integer_arithmetic(run_kernel: Run, spec: DenseSpec, seed: int) -> None:
    check(spec, run_kernel, seed)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(spec=nibbles(), seed=st.integers(0, 99))
def test_products_with_two_weights_in_a_byte_equal_integer_arithmetic(
    run_kernel: Run, spec: DenseSpec, seed: int
) -> None:
    check(spec, run_kernel, seed)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(spec=weights_alone(), seed=st.integers(0, 99))
def test_products_of_floats_with_whole_weights_equal_torch(run_kernel: Run, spec: DenseSpec, seed: int) -> None:
    check(spec, run_kernel, seed)


def test_whole_weights_for_floats_take_a_byte_or_half_of_one() -> None:
    weight = np.random.default_rng(0).integers(-7, 8, (20, 16)).astype(np.int8)
    whole, halves = dense_whole(weight, 8, 8), dense_whole(weight, 8, 4)
    assert (whole.shape, str(whole.dtype)) == ((3, 16, 8), "int8")
    assert (halves.shape, str(halves.dtype)) == ((3, 2, 8), "int32")
    np.testing.assert_array_equal(whole.transpose(0, 2, 1).reshape(24, 16)[:20], weight)
    for block, r, lane in np.ndindex(3, 16, 8):
        found = int(halves[block, r // 8, lane]) >> 4 * (r % 8) & 15
        assert (found ^ 8) - 8 == whole[block, r, lane]


def test_two_weights_in_a_byte_take_half_the_memory() -> None:
    dot = DOTS["bytes"]
    weight = np.random.default_rng(0).integers(-8, 8, (24, 64)).astype(np.int8)
    (whole, *_), (halves, *_) = dense_dot(weight, 3, 8, dot), dense_nibbles(weight, 3, 8, dot)
    assert 2 * halves.nbytes == whole.nbytes
    low, high = (halves & 15).astype(np.int8) - 8, (halves >> 4).astype(np.int8) - 8
    np.testing.assert_array_equal(np.stack([low, high], 2).reshape(whole.shape), whole)


def test_macs_are_one_for_each_weight_and_row() -> None:
    assert DenseSpec(m=3, k=5, o=7).macs == 105
