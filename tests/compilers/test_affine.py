"""What is joined or left out behind a layer changes no byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planish.compilers.cpu.convspec import DIVIDED, Step

pytestmark = pytest.mark.tvm

scales = st.floats(2.0**-10, 1.0, width=32, allow_subnormal=False)


def _chain(*ops: str, bounds: tuple[float, float] = (0.0, 6.0), scale: float = 0.25, zero_point: int = 0) -> list[Any]:
    from planish.compilers.cpu.epilogue import quantize_numbers
    from planish.compilers.tvm_graph import ChainStep

    made = {
        "quantize": lambda: ChainStep(Step("quantize"), array=quantize_numbers(scale, zero_point)),
        "clip": lambda: ChainStep(Step("clip", bounds)),
    }
    return [made.get(op, lambda op=op: ChainStep(Step(op)))() for op in ops]


def _run(chain: list[Any], values: NDArray[Any]) -> NDArray[Any]:
    """The steps by numpy, in float32 as the kernels."""
    for step in chain:
        if step.step.op == "relu":
            values = np.maximum(values, np.float32(0))
        elif step.step.op == "clip":
            low, high = step.step.values
            values = np.clip(values, np.float32(low), np.float32(high))
        else:
            numbers = step.array
            divided = values if step.step.values else values * numbers[0]
            values = np.clip(np.rint(divided) + numbers[1], 0, 255)
    return values


@given(scales, st.integers(0, 255), st.integers(-80, 80), st.integers(0, 80), st.booleans())
def test_a_bound_is_left_out_only_where_no_byte_changes(
    scale: float, zero_point: int, start: int, width: int, relu: bool
) -> None:
    from planish.compilers.tvm_affine import within_bytes

    low, high = start / 10, (start + width) / 10
    chain = _chain("relu" if relu else "clip", "quantize", bounds=(low, high), scale=scale, zero_point=zero_point)
    left = within_bytes(chain)
    ends = np.array([low, high, 0], np.float32)
    near = np.concatenate([np.nextafter(ends, np.float32(way)) for way in (-np.inf, np.inf)])
    values = np.concatenate([np.linspace(-300, 300, 4001, dtype=np.float32) * np.float32(scale), ends, near])
    np.testing.assert_array_equal(_run(left, values), _run(chain, values))


@pytest.mark.parametrize(
    ("ops", "scale", "zero_point", "left"),
    [
        (("relu", "quantize"), 0.1, 0, ["quantize"]),
        (("relu", "quantize"), 0.1, 1, ["relu", "quantize"]),
        (("clip", "quantize"), 6 / 255, 0, ["quantize"]),
        (("clip", "quantize"), 6 / 200, 0, ["clip", "quantize"]),
        (("relu", "clip", "quantize"), 6 / 255, 0, ["quantize"]),
        (("relu", "sigmoid", "quantize"), 0.1, 0, ["relu", "sigmoid", "quantize"]),
        (("relu",), 0.1, 0, ["relu"]),
        ((), 0.1, 0, []),
    ],
)
def test_what_is_left_out(ops: tuple[str, ...], scale: float, zero_point: int, left: list[str]) -> None:
    from planish.compilers.tvm_affine import within_bytes

    found = within_bytes(_chain(*ops, scale=scale, zero_point=zero_point))
    assert [step.step.op for step in found] == left


@given(scales, st.integers(0, 255), st.lists(st.booleans(), max_size=1))
def test_the_scale_joins_factor_and_offset(scale: float, zero_point: int, relu: list[bool]) -> None:
    from planish.compilers.tvm_affine import divided_by_scale

    chain = _chain(*["relu"] * len(relu), "quantize", scale=scale, zero_point=zero_point)
    affine = (np.array([0.5, -2.0]), np.array([1.0, 0.25]))
    (factor, offset), rest = divided_by_scale(affine, chain)
    assert rest[-1].step == DIVIDED
    sums = np.linspace(-500, 500, 3001)[:, None]
    before = _run(chain, (sums * affine[0] + affine[1]).astype(np.float32))
    after = _run(rest, (sums * factor + offset).astype(np.float32))
    # A sum may round to the other side of a half, and only there.
    assert np.abs(before - after).max() <= 1
    assert (before != after).mean() < 0.01


@pytest.mark.parametrize("ops", [("add", "quantize"), ("clip", "quantize"), ("relu",), ("bfloat16",), ()])
def test_the_scale_stays_where_something_stands_between(ops: tuple[str, ...]) -> None:
    from planish.compilers.tvm_affine import divided_by_scale

    affine = (np.ones(2), np.zeros(2))
    chain = _chain(*ops)
    assert divided_by_scale(affine, chain) == (affine, chain)
