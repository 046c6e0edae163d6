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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.compilers.byte_dots import HERE, largest_weight

from planish.compilers.cpu.convspec import BUFFER_STEPS, DIVIDED, EXPONENTIAL_STEPS, ConvSpec, Step
from planish.compilers.cpu.epilogue import quantize_numbers
from planish.compilers.cpu.machine import DOTS, Dot, Machine, usable_dots
from planish.compilers.cpu.packing import largest_pair, largest_sum, per_channel, weight_dot
from planish.compilers.cpu.tiles import Choice, Tile, WinogradTile, choices, winograd_sizes
from planish.hwmodels.device import host

Array = NDArray[Any]
Run = Callable[..., Array]

pytestmark = pytest.mark.tvm

WIDE = Machine(16, 32)
QUANTIZE = Step("quantize")  # to a scale of a quarter and a zero point of 7
AFFINE = (Step("scale"), Step("bias"))
EXACT = [*AFFINE, Step("add"), Step("mul"), Step("relu"), Step("clip", (-2.0, 6.0)), Step("hardswish"), QUANTIZE]
LAST = (QUANTIZE, DIVIDED)
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
            if not second and (step not in LAST or i == len(found) - 1):
                kept.append(step)
        return tuple(kept)

    return st.lists(st.sampled_from([*EXACT, *SMOOTH, DIVIDED]), max_size=3).map(allowed)


FORMS = ["plain", "blocked", "grouped", "depthwise"]


@st.composite
def specs(draw: st.DrawFn, form: str, int8: bool = False) -> ConvSpec:
    """Small convolutions of one of the forms that the lowering can ask for."""
    lanes = draw(st.sampled_from([4, 8, 16]))
    dot: Dot | None = None
    if int8:
        dot, lanes = draw(st.sampled_from(HERE))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    # The least size whose output has a pixel, and up to six more.
    h, w = (
        max(1, dilation[i] * (kernel[i] - 1) + 1 - padding[i] - padding[i + 2]) + draw(st.integers(0, 6))
        for i in range(2)
    )
    c, o, groups, in_lanes = draw(st.integers(1, 2 * lanes + 1)), draw(st.integers(1, 2 * lanes + 1)), 1, lanes
    if form == "plain":
        c = draw(st.integers(1, lanes - 1))
        in_lanes = dot.depth if dot and (dilation[1] > 1 or draw(st.booleans())) else 1
    elif form == "grouped":
        groups = draw(st.integers(2, 3))
        c, o = groups * lanes, groups * lanes * draw(st.integers(1, 2))
    elif form == "depthwise":
        o = c
    spec = ConvSpec(
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
        in_lanes=in_lanes,
        depthwise=form == "depthwise",
        dot=dot,
        steps=(*AFFINE, *draw(steps())) if int8 else draw(steps()),
        threads=draw(st.sampled_from([1, 1, 2])),
    )
    converts = int8 and (form != "depthwise" or spec.neighbours)
    return replace(spec, quantize=converts and draw(st.booleans()))


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
            value = torch.clamp(torch.round(value if step.values else value / 0.25) + 7, 0, 255)
        else:
            value = activations[step.op](value)
    return value.numpy()


def direct(spec: ConvSpec, machine: Machine = WIDE) -> Tile:
    """The tile that is chosen of the direct form, whose sums of whole numbers are exact."""
    return next(choice for choice in choices(spec, machine) if isinstance(choice, Tile))


def pairs(spec: ConvSpec) -> Machine:
    """A machine that multiplies as the spec says."""
    return Machine(spec.lanes, 32, spec.dot or DOTS["widen"])


def check(spec: ConvSpec, layout: Any, run: Run, choice: Choice | None = None, seed: int = 0) -> None:
    """Runs the kernel of a spec on random data and compares it with torch."""
    from planish.compilers.cpu.kernels import conv_kernel, conv_weights

    choice = choice or direct(spec)

    rng = np.random.default_rng(seed)
    zero_point = int(rng.choice([0, 7, 128, 255])) if spec.int8 else 0
    groups = spec.c if spec.depthwise else spec.groups
    if spec.int8:
        assert spec.dot is not None
        most = largest_weight(spec.dot)
        numbers = rng.integers(-most, min(most, 127) + 1, (spec.o, spec.c // groups, *spec.kernel))
        weight = np.where(rng.random(numbers.shape) < 0.5, -most, numbers).astype(np.int8)
        data = rng.choice([0, 1, zero_point, 254, 255], (spec.n, spec.c, spec.h, spec.w)).astype(np.uint8)
        if spec.quantize:  # eighths: every second one lies half way between two steps of a quarter
            data = (rng.integers(-300, 300, data.shape) / 8).astype(np.float32)
    else:
        weight = rng.integers(-3, 4, (spec.o, spec.c // groups, *spec.kernel)).astype(np.float32)
        data = rng.integers(-4, 5, (spec.n, spec.c, spec.h, spec.w)).astype(np.float32)
    seen = torch.from_numpy(data).double()
    if spec.quantize:
        seen = torch.clamp(torch.round(seen / 0.25) + zero_point, 0, 255)
    top, left, bottom, right = spec.padding
    framed = F.pad(seen - zero_point, (left, right, top, bottom))
    total = F.conv2d(framed, torch.from_numpy(weight).double(), None, spec.stride, 0, spec.dilation, groups)
    assert total.shape[2:] == (spec.oh, spec.ow)

    extra, arguments = [], []
    for number, step in enumerate(spec.steps):
        if step.op in ("scale", "bias"):
            # Powers of two keep the sums exact; an integer sum is brought to the size of activations first.
            values = rng.choice([-0.5, 0.25, 1, 2], spec.o) * (2.0**-12 if spec.int8 and number == 0 else 1)
            extra.append(values.reshape(-1, 1, 1))
            arguments.append(per_channel(values, spec.out_blocks, spec.lanes))
        elif step in LAST:
            arguments.append(quantize_numbers(0.25, 7))
        elif step.op in BUFFER_STEPS:
            values = rng.choice([-2, -1, 0, 1, 2], total.shape).astype(np.float32)
            extra.append(values)
            arguments.append(layout.block(values, spec.lanes, fill=5))
    expected = apply_steps(spec, total, extra)

    packed = data if spec.in_lanes != spec.lanes else layout.block(data, spec.lanes, fill=9)
    weights = [quantize_numbers(0.25, zero_point)] if spec.int8 else []
    weights += conv_weights(spec, choice, pairs(spec), weight, zero_point)
    function = conv_kernel(spec, choice, pairs(spec))
    shape = (spec.n, spec.out_blocks, spec.oh, spec.ow, spec.lanes)
    output = run(function, [packed, *weights, *arguments], shape, spec.out_dtype)
    assert np.isfinite(output).all(), "a lane without a channel must stay finite for whatever reads it next"
    result = layout.unblock(output, spec.o).astype(np.float64)
    rounded = any(step in (*SMOOTH, *STEEP, Step("hardswish")) for step in spec.steps)
    if isinstance(choice, WinogradTile) and not spec.int8:
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


@settings(max_examples=20, derandomize=True, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_sums_of_neighbouring_columns_equal_integer_arithmetic(
    layout: Any, run_kernel: Run, data: st.DataObject, seed: int
) -> None:
    """One step of a sum takes pixels of a row, and the last one reads on where the kernel has ended."""
    dot, lanes = data.draw(st.sampled_from([(dot, lanes) for dot, lanes in HERE if dot.depth > 1]))
    small = st.integers(1, 3)
    kernel = data.draw(st.tuples(small, st.integers(1, 10)))
    spec = ConvSpec(
        n=data.draw(st.integers(1, 2)), c=data.draw(small), h=kernel[0] + data.draw(st.integers(0, 4)),
        w=kernel[1] + data.draw(st.integers(0, 6)), o=data.draw(st.integers(1, 2 * lanes + 1)), kernel=kernel,
        stride=data.draw(st.tuples(small, small)), padding=data.draw(st.tuples(*[st.integers(0, 2)] * 4)),
        dilation=(data.draw(small), 1), lanes=lanes, in_lanes=1, dot=dot, quantize=data.draw(st.booleans()),
        steps=AFFINE, threads=data.draw(st.sampled_from([1, 2])),
    )  # fmt: skip
    assume(spec.h + spec.padding[0] + spec.padding[2] > spec.dilation[0] * (spec.kernel[0] - 1))
    assert spec.in_rows
    check(spec, layout, run_kernel, seed=seed)


@st.composite
def tiles(draw: st.DrawFn, spec: ConvSpec) -> Tile:
    """Any way to cut the direct form, whatever it costs."""
    oh, ow = (1, spec.oh * spec.ow) if spec.flat else (spec.oh, spec.ow)
    group_out = 1 if spec.depthwise else spec.out_blocks // spec.groups
    rows, blocks = draw(st.integers(1, min(oh, 3))), draw(st.integers(1, group_out))
    # More sums than registers would be as right, but take LLVM long.
    columns = draw(st.integers(1, max(1, min(ow, 12 // (rows * blocks)))))
    return Tile(rows, columns, blocks, draw(st.integers(0, 2)), draw(st.integers(0, oh + 1)), draw(st.booleans()))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, derandomize=True, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_every_tile_gives_the_same_result(
    layout: Any, run_kernel: Run, form: str, int8: bool, data: st.DataObject, seed: int
) -> None:
    spec = data.draw(specs(form, int8))
    check(spec, layout, run_kernel, data.draw(tiles(spec)), seed)


@pytest.mark.parametrize("int8", [False, True])
@few
@given(data=st.data(), seed=st.integers(0, 99))
def test_products_over_all_pixels_equal_torch(
    layout: Any, run_kernel: Run, int8: bool, data: st.DataObject, seed: int
) -> None:
    drawn = data.draw(specs(data.draw(st.sampled_from(["blocked", "grouped"])), int8))
    spec = replace(drawn, kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0))
    assert spec.flat
    check(spec, layout, run_kernel, data.draw(tiles(spec)), seed)


@st.composite
def winograd_cases(draw: st.DrawFn, int8: bool = False) -> tuple[ConvSpec, WinogradTile]:
    """3x3 convolutions of stride 1 on whole blocks, and any way to cut them."""
    spec = draw(specs(draw(st.sampled_from(["blocked", "grouped"])), int8))
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
    assert winograd_sizes(case[0]) == (2, 4)
    check(case[0], layout, run_kernel, case[1], seed=seed)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(case=winograd_cases(int8=True), seed=st.integers(0, 99))
def test_winograd_convolutions_of_bytes_equal_integer_arithmetic(
    layout: Any, run_kernel: Run, case: tuple[ConvSpec, WinogradTile], seed: int
) -> None:
    check(case[0], layout, run_kernel, case[1], seed=seed)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize(("dot", "lanes"), [(usable_dots(host().features, host().lanes)[0], host().lanes)])
@pytest.mark.parametrize(("sign", "zero_point"), [(1, 0), (-1, 0), (1, 255), (0, 128)])
def test_winograd_of_bytes_is_exact_at_the_largest_sums_it_is_chosen_for(
    layout: Any, run_kernel: Run, m: int, dot: Dot, lanes: int, sign: int, zero_point: int
) -> None:
    # As many channels as the bound permits; on the way the sums overflow 32 bits many times over.
    c, o = (1840 if m == 2 else 112) // lanes * lanes, lanes
    rng = np.random.default_rng(0)
    weight = (
        np.full((o, c, 3, 3), 127 * sign, np.int8) if sign else rng.choice([-128, 127], (o, c, 3, 3)).astype(np.int8)
    )
    data = rng.choice([0, 255], (1, c, 5, 5)).astype(np.uint8) if sign == 0 else np.full((1, c, 5, 5), 255, np.uint8)
    if zero_point == 255:
        data[:] = 0
    spec = ConvSpec(
        1,
        c,
        5,
        5,
        o,
        (3, 3),
        lanes=lanes,
        in_lanes=lanes,
        dot=dot,
        steps=(Step("scale"), Step("bias")),
    )
    bound = largest_sum(weight, zero_point)
    assert m in winograd_sizes(spec, bound)
    total = F.conv2d(torch.from_numpy(data).double() - zero_point, torch.from_numpy(weight).double()).numpy()
    assert np.abs(total).max() <= bound
    assert sign == 0 or np.abs(total).max() == bound
    from planish.compilers.cpu.kernels import conv_kernel, conv_weights

    machine, choice = pairs(spec), WinogradTile(m, 1, 1, 1)
    arguments = [layout.block(data, lanes), quantize_numbers(1, zero_point)]
    arguments += conv_weights(spec, choice, machine, weight, zero_point)
    arguments += [per_channel(np.full(o, value), 1, lanes) for value in (2.0**-16, 0.0)]
    output = run_kernel(conv_kernel(spec, choice, machine), arguments, (1, 1, 3, 3, lanes), "float32")
    np.testing.assert_array_equal(layout.unblock(output, o), (total.astype(np.float32) * np.float32(2.0**-16)))


def test_winograd_is_not_chosen_for_sums_that_it_cannot_hold() -> None:
    spec = ConvSpec(1, 64, 8, 8, 16, (3, 3), padding=(1, 1, 1, 1), dot=DOTS["vnni"])
    assert winograd_sizes(spec, 2**25 - 1) == (2, 4)
    assert winograd_sizes(spec, 2**25) == (2,)
    assert winograd_sizes(spec, 2**29) == ()
    assert winograd_sizes(spec, 0) == (), "of weights that are not known nothing is promised"


@settings(max_examples=100, derandomize=True)
@given(st.integers(0, 999), st.sampled_from([0, 3, 128, 255]))
def test_the_largest_sum_is_that_of_the_worst_bytes(seed: int, zero_point: int) -> None:
    weight = np.random.default_rng(seed).integers(-128, 128, (2, 2, 1, 2)).astype(np.int8)
    corners = np.array(np.meshgrid(*[[0, 255]] * 4)).reshape(4, -1).astype(np.int64) - zero_point
    sums = np.abs(weight.reshape(2, 4).astype(np.int64) @ corners)
    assert largest_sum(weight, zero_point) == max(sums.max(), 1)


@pytest.mark.parametrize("step", [*EXACT, DIVIDED, *SMOOTH, *STEEP], ids=lambda step: step.op)
def test_every_step_is_what_torch_computes(layout: Any, run_kernel: Run, step: Step) -> None:
    spec = ConvSpec(1, 8, 5, 5, 11, (3, 3), padding=(1, 1, 1, 1), lanes=8, in_lanes=8, steps=(step,))
    check(spec, layout, run_kernel)
    if step not in LAST:
        check(replace(spec, steps=(*AFFINE, step, Step("relu"), QUANTIZE)), layout, run_kernel)


@pytest.mark.parametrize("channels", [1, 2, 5, 6])
def test_the_largest_pair_is_that_of_two_neighbouring_inputs(channels: int) -> None:
    weight = np.random.default_rng(channels).integers(-128, 128, (3, channels, 2, 2)).astype(np.int8)
    pairs = [
        sum(abs(int(weight[o, i, y, x])) for i in range(first, min(first + 2, channels)))
        for o in range(3)
        for first in range(0, channels, 2)
        for y in range(2)
        for x in range(2)
    ]
    assert largest_pair(weight) == max(pairs)


@pytest.mark.parametrize(("dot", "lanes"), HERE, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_bytes_do_not_overflow(
    layout: Any, run_kernel: Run, dot: Dot, lanes: int, sign: int
) -> None:
    from planish.compilers.cpu.direct import convolution

    extreme = max(-128, min(sign * largest_weight(dot), 127))
    spec = ConvSpec(
        1, 64, 3, 3, lanes, (3, 3), lanes=lanes, in_lanes=lanes, dot=dot, steps=(Step("scale"), Step("bias"))
    )
    weights = [quantize_numbers(1, 0), *weight_dot(spec, np.full((lanes, 64, 3, 3), extreme, np.int8), 0)]
    ones, zeros = np.ones((1, lanes), np.float32), np.zeros((1, lanes), np.float32)
    data = np.full((1, 64 // lanes, 3, 3, lanes), 255, np.uint8)
    function = convolution(spec, direct(spec))
    output = run_kernel(function, [data, *weights, ones, zeros], (1, 1, 1, 1, lanes), "float32")
    assert (output == 255 * extreme * 9 * 64).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_more_threads_share_the_rows_of_every_kernel(threads: int) -> None:
    from planish.compilers.cpu.dense import DenseSpec, dense
    from planish.compilers.cpu.direct import convolution
    from planish.compilers.cpu.pool import PoolSpec, pool

    spec = ConvSpec(1, 16, 9, 9, 16, (3, 3), padding=(1, 1, 1, 1), threads=threads)
    pooled = PoolSpec(1, 1, 9, 9, (3, 3), (1, 1), (1, 1, 1, 1), (9, 9), True, threads=threads)
    kernels = (
        convolution(spec, Tile(1, 3, 1)),
        convolution(spec, Tile(1, 3, 1, split_blocks=True)),
        dense(DenseSpec(4, 8, 32, threads=threads), WIDE),
        pool(pooled),
    )
    # A block of output channels cannot be shared: then threads take strips of rows, each with its own copy of the data.
    assert [kernel.script().count("T.parallel") for kernel in kernels] == [1 if threads > 1 else 0] * 4


def test_an_unknown_step_is_refused_by_name() -> None:
    from planish.compilers.cpu.direct import convolution

    spec = ConvSpec(1, 16, 3, 3, 16, (1, 1), steps=(Step("softplus"),))
    with pytest.raises(ValueError, match="'softplus'"):
        convolution(spec, Tile(1, 1, 1))


@settings(max_examples=200, derandomize=True)
@given(st.sampled_from(FORMS).flatmap(specs), st.sampled_from([16, 32]))
def test_a_chosen_tile_fits_the_registers_and_the_output(spec: ConvSpec, registers: int) -> None:
    tile = direct(spec, Machine(spec.lanes, registers))
    assert tile.accumulators < registers
    assert tile.blocks <= (1 if spec.depthwise else spec.out_blocks // spec.groups)
    assert tile.oh * tile.ow <= spec.oh * spec.ow
    assert spec.flat or (tile.ow <= spec.ow and tile.oh <= spec.oh)


@settings(max_examples=100, derandomize=True)
@given(st.sampled_from(FORMS).flatmap(specs))
def test_macs_are_those_of_the_loops_without_padding(spec: ConvSpec) -> None:
    groups = spec.c if spec.depthwise else spec.groups
    x, weight = torch.zeros(spec.n, spec.c, spec.h, spec.w), torch.zeros(spec.o, spec.c // groups, *spec.kernel)
    top, left, bottom, right = spec.padding
    out = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, spec.stride, 0, spec.dilation, groups)
    assert spec.macs == out.numel() * weight[0].numel()
