"""The CPU's convolution kernels against torch in float64.

Data, weights, factors and offsets are small whole numbers and powers of two, so that float32 holds every sum exactly
and results are compared for equality; only exponentials need a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from planish.compilers.cpu.convspec import BUFFER_STEPS, EXPONENTIAL_STEPS, ConvSpec, Step
from planish.compilers.cpu.packing import per_channel, weight_int8
from planish.compilers.cpu.tiles import Choice, Tile, WinogradTile, choices, winograd_applies
from planish.hwmodels.device import host

Array = NDArray[Any]
Run = Callable[..., Array]

pytestmark = pytest.mark.tvm

HAS_VNNI = "avx512_vnni" in host().features
QUANTIZE = Step("quantize", (0.25, 7))
AFFINE = (Step("scale"), Step("bias"))
EXACT = [*AFFINE, Step("add"), Step("mul"), Step("relu"), Step("clip", (-2.0, 6.0)), Step("hardswish"), QUANTIZE]
SMOOTH = [Step(op) for op in ("sigmoid", "silu", "tanh", "hardsigmoid", "gelu", "erf")]
STEEP = [Step("exp")]  # of a rounded argument its value is another one
# hardswish divides by six, which is no power of two.
TOLERANCE = 2e-6
# Of the largest sum, for F(4x4, 3x3) in float32: its transforms' constants reach 8, and their products 64.
WINOGRAD_TOLERANCE = 5e-6

few = settings(max_examples=12, derandomize=True, deadline=None)


def steps() -> st.SearchStrategy[tuple[Step, ...]]:
    """Up to three steps, of which only the last may quantise, and one may be an exponential."""

    def allowed(found: list[Step]) -> tuple[Step, ...]:
        kept: list[Step] = []
        for i, step in enumerate(found):
            second = step.op in EXPONENTIAL_STEPS and any(other.op in EXPONENTIAL_STEPS for other in kept)
            if not second and (step is not QUANTIZE or i == len(found) - 1):
                kept.append(step)
        return tuple(kept)

    return st.lists(st.sampled_from([*EXACT, *SMOOTH]), max_size=3).map(allowed)


FORMS = ["plain", "blocked", "grouped", "depthwise"]


@st.composite
def specs(draw: st.DrawFn, form: str, int8: bool = False) -> ConvSpec:
    """Small convolutions of one of the forms that the lowering can ask for."""
    lanes = draw(st.sampled_from([4, 8, 16]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    # The least size whose output has a pixel, and up to six more.
    h, w = (
        max(1, dilation[i] * (kernel[i] - 1) + 1 - padding[i] - padding[i + 2]) + draw(st.integers(0, 6))
        for i in range(2)
    )
    c, o, groups = draw(st.integers(1, 2 * lanes + 1)), draw(st.integers(1, 2 * lanes + 1)), 1
    if form == "plain":
        c = draw(st.integers(1, lanes - 1))
    elif form == "grouped":
        groups = draw(st.integers(2, 3))
        c, o = groups * lanes, groups * lanes * draw(st.integers(1, 2))
    elif form == "depthwise":
        o = c
    zero_point = draw(st.sampled_from([0, 7, 128, 255])) if int8 else 0
    return ConvSpec(
        n=draw(st.integers(1, 2)),
        c=c,
        h=h,
        w=w,
        o=o,
        kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        lanes=lanes,
        in_lanes=(-(-c // 4) * 4 if int8 else 1) if form == "plain" else lanes,
        depthwise=form == "depthwise",
        int8=int8,
        zero_point=zero_point,
        quantize=draw(st.sampled_from([None, (0.25, zero_point)])) if int8 else None,
        steps=(*AFFINE, *draw(steps())) if int8 else draw(steps()),
        threads=draw(st.sampled_from([1, 1, 2])),
    )


def apply_steps(spec: ConvSpec, value: torch.Tensor, extra: list[Array]) -> Array:
    """The steps by torch, on float64 of shape (n, o, oh, ow)."""
    remaining = iter(torch.from_numpy(a).double() for a in extra)
    activations: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "tanh": torch.tanh,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "gelu": F.gelu,
        "erf": torch.erf,
        "exp": lambda v: torch.exp(v.clamp(-87.3, 88.0)),
    }
    for step in spec.steps:
        if step.op in ("scale", "mul"):
            value = value * next(remaining)
        elif step.op in ("bias", "add"):
            value = value + next(remaining)
        elif step.op == "clip":
            value = value.clamp(*step.values)
        elif step.op == "quantize":
            value = torch.clamp(torch.round(value / step.values[0]) + step.values[1], 0, 255)
        else:
            value = activations[step.op](value)
    return value.numpy()


def direct(spec: ConvSpec, registers: int = 32) -> Tile:
    """The tile that is chosen of the direct form, whose sums of whole numbers are exact."""
    return next(choice for choice in choices(spec, registers) if isinstance(choice, Tile))


def check(
    spec: ConvSpec, layout: Any, run: Run, choice: Choice | None = None, vnni: bool = False, seed: int = 0
) -> None:
    """Runs the kernel of a spec on random data and compares it with torch."""
    from planish.compilers.cpu.kernels import conv_kernel, conv_weights

    choice = choice or direct(spec)

    rng = np.random.default_rng(seed)
    groups = spec.c if spec.depthwise else spec.groups
    if spec.int8:
        weight = rng.integers(-128, 128, (spec.o, spec.c // groups, *spec.kernel)).astype(np.int8)
        data = rng.choice([0, 1, spec.zero_point, 254, 255], (spec.n, spec.c, spec.h, spec.w)).astype(np.uint8)
        if spec.quantize is not None:  # eighths: every second one lies half way between two steps of a quarter
            data = (rng.integers(-300, 300, data.shape) / 8).astype(np.float32)
    else:
        weight = rng.integers(-3, 4, (spec.o, spec.c // groups, *spec.kernel)).astype(np.float32)
        data = rng.integers(-4, 5, (spec.n, spec.c, spec.h, spec.w)).astype(np.float32)
    seen = torch.from_numpy(data).double()
    if spec.quantize is not None:
        seen = torch.clamp(torch.round(seen / spec.quantize[0]) + spec.quantize[1], 0, 255)
    top, left, bottom, right = spec.padding
    framed = F.pad(seen - spec.zero_point, (left, right, top, bottom))
    total = F.conv2d(framed, torch.from_numpy(weight).double(), None, spec.stride, 0, spec.dilation, groups)
    assert total.shape[2:] == (spec.oh, spec.ow)

    extra, arguments = [], []
    for number, step in enumerate(spec.steps):
        if step.op in ("scale", "bias"):
            # Powers of two keep the sums exact; an integer sum is brought to the size of activations first.
            values = rng.choice([-0.5, 0.25, 1, 2], spec.o) * (2.0**-12 if spec.int8 and number == 0 else 1)
            extra.append(values.reshape(-1, 1, 1))
            arguments.append(per_channel(values, spec.out_blocks, spec.lanes))
        elif step.op in BUFFER_STEPS:
            values = rng.choice([-2, -1, 0, 1, 2], total.shape).astype(np.float32)
            extra.append(values)
            arguments.append(layout.block(values, spec.lanes, fill=5))
    expected = apply_steps(spec, total, extra)

    packed = data if spec.in_lanes != spec.lanes else layout.block(data, spec.lanes, fill=9)
    weights = conv_weights(spec, choice, weight)
    function = conv_kernel(spec, choice, vnni=vnni)
    shape = (spec.n, spec.out_blocks, spec.oh, spec.ow, spec.lanes)
    output = run(function, [packed, *weights, *arguments], shape, spec.out_dtype)
    assert np.isfinite(output).all(), "a lane without a channel must stay finite for whatever reads it next"
    result = layout.unblock(output, spec.o).astype(np.float64)
    rounded = any(step in (*SMOOTH, *STEEP, Step("hardswish")) for step in spec.steps)
    if isinstance(choice, WinogradTile):
        # Its transforms round: the error follows the size of the sums before the steps, which may cancel, and
        # each of three steps may double it.
        tolerance = WINOGRAD_TOLERANCE * max(1, float(total.abs().max())) * 16
        np.testing.assert_allclose(result, expected, rtol=0, atol=1 if spec.out_dtype == "uint8" else tolerance)
    elif not rounded:
        np.testing.assert_array_equal(result, expected)
    elif spec.out_dtype == "uint8":  # float32 may lie on the other side of a boundary between two steps
        np.testing.assert_allclose(result, expected, rtol=0, atol=1)
    else:
        np.testing.assert_allclose(result, expected, rtol=TOLERANCE, atol=TOLERANCE * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("form", FORMS)
@few
@given(data=st.data(), seed=st.integers(0, 99))
def test_float_convolutions_equal_torch(
    layout: Any, run_kernel: Run, form: str, data: st.DataObject, seed: int
) -> None:
    check(data.draw(specs(form)), layout, run_kernel, seed=seed)


@pytest.mark.parametrize("form", FORMS)
@few
@given(data=st.data(), seed=st.integers(0, 99))
def test_int8_convolutions_equal_integer_arithmetic(
    layout: Any, run_kernel: Run, form: str, data: st.DataObject, seed: int
) -> None:
    check(data.draw(specs(form, int8=True)), layout, run_kernel, seed=seed)


@pytest.mark.skipif(not HAS_VNNI, reason="this CPU has no AVX-512 VNNI")
@pytest.mark.parametrize("form", FORMS[:-1])
@few
@given(data=st.data(), seed=st.integers(0, 99))
def test_int8_convolutions_with_vnni_equal_integer_arithmetic(
    layout: Any, run_kernel: Run, form: str, data: st.DataObject, seed: int
) -> None:
    spec = data.draw(specs(form, int8=True))
    wide = replace(spec, lanes=16, in_lanes=spec.in_lanes if form == "plain" else 16)
    if form == "grouped":
        wide = replace(wide, c=spec.groups * 16, o=spec.groups * 16)
    check(wide, layout, run_kernel, vnni=True, seed=seed)


@pytest.mark.parametrize("form", ["blocked", "depthwise"])
@few
@given(data=st.data(), tile=st.builds(Tile, st.integers(1, 4), st.integers(1, 9), st.just(1)))
def test_every_tile_gives_the_same_result(
    layout: Any, run_kernel: Run, form: str, data: st.DataObject, tile: Tile
) -> None:
    check(data.draw(specs(form)), layout, run_kernel, tile)


@st.composite
def winograd_cases(draw: st.DrawFn) -> tuple[ConvSpec, WinogradTile]:
    """3x3 convolutions of stride 1 on whole blocks, and any way to cut them."""
    spec = draw(specs(draw(st.sampled_from(["blocked", "grouped"]))))
    h, w = (max(spec.h, 3 - spec.padding[0] - spec.padding[2]), max(spec.w, 3 - spec.padding[1] - spec.padding[3]))
    spec = replace(spec, kernel=(3, 3), stride=(1, 1), dilation=(1, 1), h=h, w=w)
    tiles, times = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    blocks = draw(st.sampled_from([b for b in (1, 2) if (spec.out_blocks // spec.groups) % b == 0]))
    return spec, WinogradTile(draw(st.sampled_from([2, 4])), tiles * times, tiles, blocks)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(case=winograd_cases(), seed=st.integers(0, 99))
def test_winograd_convolutions_equal_torch(
    layout: Any, run_kernel: Run, case: tuple[ConvSpec, WinogradTile], seed: int
) -> None:
    assert winograd_applies(case[0])
    check(case[0], layout, run_kernel, case[1], seed=seed)


@pytest.mark.parametrize("step", [*EXACT, *SMOOTH, *STEEP], ids=lambda step: step.op)
def test_every_step_is_what_torch_computes(layout: Any, run_kernel: Run, step: Step) -> None:
    spec = ConvSpec(1, 8, 5, 5, 11, (3, 3), padding=(1, 1, 1, 1), lanes=8, in_lanes=8, steps=(step,))
    check(spec, layout, run_kernel)
    if step is not QUANTIZE:
        check(replace(spec, steps=(*AFFINE, step, Step("relu"), QUANTIZE)), layout, run_kernel)


@pytest.mark.parametrize("vnni", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_VNNI, reason="no VNNI"))])
@pytest.mark.parametrize("extreme", [127, -128])
def test_the_largest_sums_of_bytes_do_not_overflow(layout: Any, run_kernel: Run, vnni: bool, extreme: int) -> None:
    from planish.compilers.cpu.conv import convolution

    spec = ConvSpec(1, 64, 3, 3, 16, (3, 3), int8=True, steps=(Step("scale"), Step("bias")))
    weight, correction = weight_int8(spec, np.full((16, 64, 3, 3), extreme, np.int8))
    ones, zeros = np.ones((1, 16), np.float32), np.zeros((1, 16), np.float32)
    data = np.full((1, 4, 3, 3, 16), 255, np.uint8)
    function = convolution(spec, direct(spec), vnni=vnni)
    output = run_kernel(function, [data, weight, correction, ones, zeros], (1, 1, 1, 1, 16), "float32")
    assert (output == 255 * extreme * 9 * 64).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_more_threads_share_the_rows_of_every_kernel(threads: int) -> None:
    from planish.compilers.cpu.conv import convolution
    from planish.compilers.cpu.dense import DenseSpec, dense
    from planish.compilers.cpu.pool import PoolSpec, pool

    spec = ConvSpec(1, 16, 9, 9, 16, (3, 3), padding=(1, 1, 1, 1), threads=threads)
    pooled = PoolSpec(1, 1, 9, 9, (3, 3), (1, 1), (1, 1, 1, 1), (9, 9), True, threads=threads)
    kernels = (convolution(spec, Tile(1, 3, 1)), dense(DenseSpec(4, 8, 32, threads=threads)), pool(pooled))
    # The convolution's frame is filled by a loop of its own.
    assert [kernel.script().count("T.parallel") for kernel in kernels] == ([2, 1, 1] if threads > 1 else [0, 0, 0])


def test_an_unknown_step_is_refused_by_name() -> None:
    from planish.compilers.cpu.conv import convolution

    spec = ConvSpec(1, 16, 3, 3, 16, (1, 1), steps=(Step("softplus"),))
    with pytest.raises(ValueError, match="'softplus'"):
        convolution(spec, Tile(1, 1, 1))


@settings(max_examples=200, derandomize=True)
@given(st.sampled_from(FORMS).flatmap(specs), st.sampled_from([16, 32]))
def test_a_chosen_tile_fits_the_registers_and_divides_the_blocks(spec: ConvSpec, registers: int) -> None:
    tile = direct(spec, registers)
    assert tile.accumulators < registers
    blocks = 1 if spec.depthwise else spec.out_blocks // spec.groups
    assert blocks % tile.blocks == 0
    assert tile.ow <= spec.ow
    assert tile.oh <= spec.oh


@settings(max_examples=100, derandomize=True)
@given(st.sampled_from(FORMS).flatmap(specs))
def test_macs_are_those_of_the_loops_without_padding(spec: ConvSpec) -> None:
    groups = spec.c if spec.depthwise else spec.groups
    x, weight = torch.zeros(spec.n, spec.c, spec.h, spec.w), torch.zeros(spec.o, spec.c // groups, *spec.kernel)
    top, left, bottom, right = spec.padding
    out = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, spec.stride, 0, spec.dilation, groups)
    assert spec.macs == out.numel() * weight[0].numel()
