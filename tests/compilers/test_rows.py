"""Layer norm, softmax and attention, and the elementary functions under them, against torch in float64."""

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

from planish.compilers.cpu.attention import AttentionSpec, Strided, attention
from planish.compilers.cpu.machine import Machine
from planish.compilers.cpu.rows import RowSpec, rows

Array = NDArray[Any]
Run = Callable[..., Array]

pytestmark = pytest.mark.tvm

few = settings(max_examples=15, derandomize=True, deadline=None)
lanes = st.sampled_from([4, 8, 16])
threads = st.sampled_from([1, 2])


@few
@given(m=st.integers(1, 7), k=st.integers(1, 300), lanes=lanes, threads=threads, shift=st.sampled_from([0.0, 100.0]))
def test_a_layer_norm_is_torchs(run_kernel: Run, m: int, k: int, lanes: int, threads: int, shift: float) -> None:
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((m, k)) + shift).astype(np.float32)
    weight, bias = (rng.standard_normal(k).astype(np.float32) for _ in range(2))
    seen, factor, offset = (torch.from_numpy(a).double() for a in (x, weight, bias))
    expected = F.layer_norm(seen, (k,), factor, offset, 1e-5)
    got = run_kernel(rows(RowSpec("layer_norm", m, k, 1e-5, lanes, threads)), [x, weight, bias], (m, k), "float32")
    # A mean of 100 in float32 is known to 1e-5, and the smallest deviation of two numbers may be not much larger.
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=2e-5 if shift == 0 else 2e-2)


@few
@given(m=st.integers(1, 7), k=st.integers(1, 300), lanes=lanes, threads=threads, scale=st.sampled_from([1.0, 50.0]))
def test_a_softmax_is_torchs(run_kernel: Run, m: int, k: int, lanes: int, threads: int, scale: float) -> None:
    x = (np.random.default_rng(k).standard_normal((m, k)) * scale).astype(np.float32)
    got = run_kernel(rows(RowSpec("softmax", m, k, 0.0, lanes, threads)), [x], (m, k), "float32")
    np.testing.assert_allclose(got, torch.from_numpy(x).double().softmax(-1).numpy(), rtol=1e-5, atol=1e-7)


@few
@given(
    n=st.integers(1, 2), s=st.integers(1, 14), t=st.integers(1, 70), heads=st.integers(1, 3), d=st.integers(1, 20),
    wide=st.integers(1, 5), lanes=lanes, threads=threads,
)  # fmt: skip
def test_attention_is_torchs(
    run_kernel: Run, n: int, s: int, t: int, heads: int, d: int, wide: int, lanes: int, threads: int
) -> None:
    rng = np.random.default_rng(t)
    dv = wide * lanes
    q, k, v = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((n, s, heads, d), (n, t, heads, d), (n, t, heads, dv))
    )
    scores = np.einsum("nshd,nthd->nhst", q.astype(np.float64), k.astype(np.float64)) * 0.7
    weights = torch.from_numpy(scores).softmax(-1).numpy()
    spec = AttentionSpec(n, s, t, heads, d, dv, 0.7, lanes, threads)
    got = run_kernel(attention(spec, Machine(spec.lanes, 16)), [q, k, v], (n, s, heads, dv), "float32")
    np.testing.assert_allclose(got, np.einsum("nhst,nthd->nshd", weights, v), rtol=0, atol=2e-5)
    assert spec.macs == n * heads * s * t * (d + dv)


@few
@given(
    n=st.integers(1, 2), t=st.integers(1, 40), heads=st.integers(1, 3), wide=st.integers(1, 3), lanes=lanes,
    threads=threads, heads_first=st.booleans(),
)  # fmt: skip
def test_attention_reads_its_operands_where_they_lie(
    run_kernel: Run, n: int, t: int, heads: int, wide: int, lanes: int, threads: int, heads_first: bool
) -> None:
    """q, k and v in one value: one after the other in every row, or cut by heads first."""
    d = wide * lanes
    packed = np.random.default_rng(t).standard_normal((n, t, 3 * heads * d)).astype(np.float32)
    shape, order = ((n, t, heads, 3, d), (3, 0, 1, 2, 4)) if heads_first else ((n, t, 3, heads, d), (2, 0, 1, 3, 4))
    operands = packed.reshape(shape).transpose(order)
    start = packed.ctypes.data
    places = tuple(
        Strided(packed.shape, (part.ctypes.data - start) // 4, tuple(stride // 4 for stride in part.strides))
        for part in operands
    )
    q, k, v = (part.astype(np.float64) for part in operands)
    weights = torch.from_numpy(np.einsum("nshd,nthd->nhst", q, k) * 0.3).softmax(-1).numpy()
    spec = AttentionSpec(n, t, t, heads, d, d, 0.3, lanes, threads, places)  # type: ignore[arg-type]
    got = run_kernel(attention(spec, Machine(lanes, 16)), [packed] * 3, (n, t, heads, d), "float32")
    np.testing.assert_allclose(got, np.einsum("nhst,nthd->nshd", weights, v), rtol=0, atol=2e-5)
