"""The schedule for what has no kernel of its own: right, vectorised, and spread over threads where it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]
Run = Callable[..., Array]

pytestmark = pytest.mark.tvm


def schedule(function: Any, lanes: int, threads: int) -> tuple[Any, str]:
    """The scheduled function and its text."""
    import tvm

    from planish.compilers.cpu.fallback import schedule_rest

    scheduled = schedule_rest(tvm.IRModule({"main": function}), lanes, threads)["main"]
    return scheduled, str(scheduled.script())


def product(rows: int, depth: int, columns: int) -> Any:
    from tvm import te

    a, b = te.placeholder((rows, depth), name="a"), te.placeholder((depth, columns), name="b")
    k = te.reduce_axis((0, depth), "k")
    return te.create_prim_func([a, b, te.compute((rows, columns), lambda i, j: te.sum(a[i, k] * b[k, j], axis=[k]))])


def centred(rows: int, columns: int) -> Any:
    """max(x - the row's maximum, -1) * 2: a reduction between elementwise stages."""
    from tvm import te

    x = te.placeholder((rows, columns), name="x")
    k = te.reduce_axis((0, columns), "k")
    top = te.compute((rows,), lambda i: te.max(x[i, k], axis=[k]), name="top")
    moved = te.compute((rows, columns), lambda i, j: x[i, j] - top[i], name="moved")
    return te.create_prim_func([x, te.compute((rows, columns), lambda i, j: te.max(moved[i, j], -1.0) * 2.0)])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(3, 5, 7), (4, 6, 16), (1, 1, 1), (260, 8, 128)])
def test_products_are_right_on_any_shape_and_threads(
    run_kernel: Run, rows: int, depth: int, columns: int, threads: int
) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (rows, depth)).astype(np.float32)
    b = rng.integers(-4, 5, (depth, columns)).astype(np.float32)
    function, text = schedule(product(rows, depth, columns), 16, threads)
    np.testing.assert_array_equal(run_kernel(function, [a, b], (rows, columns), "float32"), a @ b)
    assert ("T.vectorized" in text) == (columns % 16 == 0)
    assert ("T.parallel" in text) == (threads > 1 and rows * columns >= 32768)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (8, 32), (300, 128)])
def test_a_reduction_between_elementwise_stages_is_right(run_kernel: Run, rows: int, columns: int) -> None:
    x = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    function, text = schedule(centred(rows, columns), 8, 2)
    expected = np.maximum(x - x.max(1, keepdims=True), -1) * 2
    np.testing.assert_allclose(run_kernel(function, [x], (rows, columns), "float32"), expected, rtol=1e-6)
    assert "moved" not in text, "an elementwise stage is computed where it is read"
    assert ("T.parallel" in text) == (rows * columns >= 32768)
