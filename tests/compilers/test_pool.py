"""Pooling and global means on blocked tensors against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from planish.compilers.cpu.pool import MeanSpec, PoolSpec, global_mean, pool

Array = NDArray[Any]
Run = Callable[..., Array]

pytestmark = pytest.mark.tvm

# One rounding of the sum's factor, and one of the sum.
TOLERANCE = 3e-7


@st.composite
def specs(draw: st.DrawFn) -> PoolSpec:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    # As in torch, no window lies in the frame alone.
    padding = tuple(draw(st.integers(0, kernel[i % 2] // 2)) for i in range(4))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    h, w = (max(1, kernel[i] - padding[i] - padding[i + 2]) + draw(st.integers(0, 5)) for i in range(2))
    out = tuple((s + padding[i] + padding[i + 2] - kernel[i]) // stride[i] + 1 for i, s in enumerate((h, w)))
    return PoolSpec(
        n=draw(st.integers(1, 2)),
        blocks=draw(st.integers(1, 2)),
        h=h,
        w=w,
        kernel=kernel,
        stride=stride,
        padding=(padding[0], padding[1], padding[2], padding[3]),
        out=(out[0], out[1]),
        maximum=draw(st.booleans()),
        count_include_pad=draw(st.booleans()),
        lanes=draw(st.sampled_from([4, 8, 16])),
        threads=draw(st.sampled_from([1, 1, 2])),
    )


def reference(spec: PoolSpec, x: torch.Tensor) -> torch.Tensor:
    top, left, bottom, right = spec.padding
    frame = (left, right, top, bottom)
    if spec.maximum:
        return F.max_pool2d(F.pad(x, frame, value=-torch.inf), spec.kernel, spec.stride)
    sums = F.avg_pool2d(F.pad(x, frame), spec.kernel, spec.stride, divisor_override=1)
    ones = F.pad(torch.ones_like(x), frame, value=float(spec.count_include_pad))
    return sums / F.avg_pool2d(ones, spec.kernel, spec.stride, divisor_override=1)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(spec=specs(), seed=st.integers(0, 99))
def test_pooling_equals_torch(layout: Any, run_kernel: Run, spec: PoolSpec, seed: int) -> None:
    shape = (spec.n, spec.blocks * spec.lanes, spec.h, spec.w)
    # All negative: a frame of zeros would be larger than every value.
    x = -np.random.default_rng(seed).random(shape).astype(np.float32) - 1
    out = (spec.n, spec.blocks, *spec.out, spec.lanes)
    output = run_kernel(pool(spec), [layout.block(x, spec.lanes)], out, "float32")
    expected = reference(spec, torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(layout.unblock(output, shape[1]), expected, rtol=TOLERANCE)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("include", [False, True])
def test_the_reference_is_torchs_own_average_where_torch_has_one(padding: int, include: bool) -> None:
    spec = PoolSpec(1, 1, 7, 6, (3, 3), (2, 2), (padding,) * 4, (4, 3), False, include, 4)
    x = torch.rand(1, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(reference(spec, x), F.avg_pool2d(x, 3, 2, padding, count_include_pad=include))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n", "c", "h", "w", "lanes"), [(1, 16, 8, 8, 16), (2, 5, 1, 1, 4), (3, 37, 3, 7, 16), (1, 1, 2, 1, 8)]
)
def test_global_means_equal_torch(
    layout: Any, run_kernel: Run, n: int, c: int, h: int, w: int, lanes: int, threads: int
) -> None:
    x = np.random.default_rng(0).random((n, c, h, w)).astype(np.float32)
    output = run_kernel(
        global_mean(MeanSpec(n, c, h, w, lanes, threads)), [layout.block(x, lanes, fill=1e9)], (n, c), "float32"
    )
    expected = torch.from_numpy(x).double().mean((2, 3)).numpy()
    np.testing.assert_allclose(output, expected, rtol=h * w * TOLERANCE)
