"""Four vectors of float32 that become bytes at once, against numpy; and kernels whose results are stored so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.compilers.byte_dots import HERE
from tests.compilers.test_conv import AFFINE, check

from planish.compilers.cpu.convspec import DIVIDED, ConvSpec
from planish.compilers.cpu.machine import DOTS, Dot
from planish.compilers.cpu.tiles import Tile
from planish.hwmodels.device import host

Run = Callable[..., NDArray[Any]]

pytestmark = pytest.mark.tvm

LANES = [lanes for lanes, feature in ((8, "avx2"), (16, "avx512_vnni")) if feature in host().features]
NEIGHBOURS = [(dot, lanes) for dot, lanes in HERE if dot.name in ("vnni", "sdot")]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_vectors_become_bytes_as_rounding_and_clamping_say(run_kernel: Run, lanes: int, zero_point: int) -> None:
    from tvm.tirx.script import builder as T

    from planish.compilers.cpu.emit import argument, kernel
    from planish.compilers.cpu.narrow import TOGETHER, bytes_of

    steps = np.arange(-300, 300, dtype=np.float32)
    far = [2.0**k * sign for k in (15, 16, 24, 31, 32, 100) for sign in (-1, 1)]
    values = np.array([*steps, *(steps + 0.5), *(steps + 0.49), -0.0, *far, np.inf, -np.inf, np.nan], np.float32)
    width = TOGETHER * lanes
    rows = -(-len(values) // width)
    data = np.zeros((rows, width), np.float32)
    data.ravel()[: len(values)] = np.random.default_rng(0).permutation(values)

    with kernel() as (emitted, body):
        source, zero, out = argument("data", data.shape), argument("zero", (1,)), argument("out", data.shape, "uint8")

        def every_row() -> None:
            with T.serial(0, rows) as row:
                vectors = [source[row, T.ramp(k * lanes, 1, lanes)] for k in range(TOGETHER)]
                T.buffer_store(out, bytes_of(vectors, zero[0], lanes), [row, T.ramp(0, 1, width)])

        body(every_row)
    found = run_kernel(emitted.function, [data, np.array([zero_point], np.float32)], data.shape, "uint8")
    # NaN is taken for less than anything.
    expected = np.clip(np.rint(np.nan_to_num(data.astype(np.float64), nan=-np.inf)) + zero_point, 0, 255)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["widen", "halves", "sdot"])
def test_only_x86_narrows_so(name: str) -> None:
    from planish.compilers.cpu.narrow import narrows

    assert not narrows(DOTS[name], 16)
    assert not narrows(None, 16)
    assert not narrows(DOTS["vnni"], 4)
    assert narrows(DOTS["vnni"], 16)


@pytest.mark.parametrize(("dot", "lanes"), HERE, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("columns", [4, 5, 7])
def test_the_last_four_pixels_of_a_tile_may_overlap_those_before(
    layout: Any, run_kernel: Run, dot: Dot, lanes: int, columns: int
) -> None:
    spec = ConvSpec(
        2, lanes, 5, 9, lanes, (3, 3), padding=(1, 1, 1, 1), lanes=lanes, in_lanes=lanes, dot=dot, quantize=True,
        steps=(*AFFINE, DIVIDED),
    )  # fmt: skip
    check(spec, layout, run_kernel, Tile(1, columns, 1))


@pytest.mark.skipif(not NEIGHBOURS, reason="this CPU sums no four bytes a lane")
@pytest.mark.parametrize("dot_lanes", NEIGHBOURS, ids=lambda value: f"{value[0].name}-{value[1]}")
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (1, 7)])
def test_depthwise_convolutions_of_several_strips_equal_integer_arithmetic(
    layout: Any, run_kernel: Run, dot_lanes: tuple[Dot, int], quantize: bool, stride: int, kernel: int
) -> None:
    dot, lanes = dot_lanes
    pad = kernel // 2
    spec = ConvSpec(
        1, 2 * lanes, 83, 70, 2 * lanes, (kernel, kernel), (stride, stride), (pad,) * 4, lanes=lanes, in_lanes=lanes,
        depthwise=True, dot=dot, quantize=quantize, steps=(*AFFINE, DIVIDED), threads=2,
    )  # fmt: skip
    assert spec.neighbours
    check(spec, layout, run_kernel)


@pytest.mark.skipif(not NEIGHBOURS, reason="this CPU sums no four bytes a lane")
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_depthwise_convolutions_of_images_smaller_than_a_tile(
    layout: Any, run_kernel: Run, rows: int, columns: int
) -> None:
    dot, lanes = NEIGHBOURS[0]
    spec = ConvSpec(
        3, lanes + 1, rows, columns, lanes + 1, (3, 5), padding=(1, 2, 1, 2), lanes=lanes, in_lanes=lanes,
        depthwise=True, dot=dot, steps=(*AFFINE, DIVIDED),
    )  # fmt: skip
    check(spec, layout, run_kernel)


@pytest.mark.parametrize(("dot", "lanes"), HERE, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("form", ["depthwise", "blocked"])
def test_of_steps_longer_than_the_kernel_pixels_are_left_out(
    layout: Any, run_kernel: Run, dot: Dot, lanes: int, form: str
) -> None:
    spec = ConvSpec(
        1, lanes, 9, 40, lanes, (1, 1), (3, 9), lanes=lanes, in_lanes=lanes, depthwise=form == "depthwise", dot=dot,
        steps=(*AFFINE, DIVIDED),
    )  # fmt: skip
    converts = form == "blocked" or spec.neighbours
    check(replace(spec, quantize=converts), layout, run_kernel)
    check(spec, layout, run_kernel)
