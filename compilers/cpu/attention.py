"""Scaled dot-product attention for LLVM CPUs (Vaswani et al. 2017), a few rows of queries at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from .emit import argument, copied, kernel, local, loop, parts, product
from .functions import exp
from .rows import reduce_row

# Rows of queries whose scores are kept at once: with four blocks, 24 sums of the 32 registers.
_ROWS = 6


@dataclass(frozen=True)
class AttentionSpec:
    """softmax(scale q k') v: q and the result (n, s, heads, d), k (n, t, heads, d) and v (n, t, heads, dv).

    `d` may be anything; `dv` is a multiple of `lanes`.
    """

    n: int
    s: int
    t: int
    heads: int
    d: int
    dv: int
    scale: float
    lanes: int = 16
    threads: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the two products."""
        return self.n * self.heads * self.s * self.t * (self.d + self.dv)


def attention(spec: AttentionSpec) -> tvm.tirx.PrimFunc:
    """The function of (q, k, v, output)."""
    with kernel() as (emitted, body):
        body(_Attention(spec).body)
    return emitted.function


class _Attention:
    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.blocks = ceil(spec.t / spec.lanes)
        self.q = argument("q", (spec.n, spec.s, spec.heads, spec.d))
        self.k = argument("k", (spec.n, spec.t, spec.heads, spec.d))
        self.v = argument("v", (spec.n, spec.t, spec.heads, spec.dv))
        self.out = argument("out", (spec.n, spec.s, spec.heads, spec.dv))

    def body(self) -> None:
        spec = self.spec
        # Keys are turned once, so that one vector holds the same component of neighbouring keys.
        turned = local((spec.n, spec.heads, self.blocks, spec.d, spec.lanes), scope="global")
        with loop(spec.n * spec.heads * self.blocks, spec.threads) as place:
            n, head = T.bind(place // (spec.heads * self.blocks)), T.bind(place // self.blocks % spec.heads)
            block = T.bind(place % self.blocks)
            with T.serial(0, spec.d) as d, T.serial(0, spec.lanes) as lane:
                # What fills the last block repeats the last key; its scores are not used.
                key = T.min(block * spec.lanes + lane, spec.t - 1)
                T.buffer_store(turned, self.k[n, key, head, d], [n, head, block, d, lane])
        for start, count, rows in parts(spec.s, _ROWS):
            with loop(spec.n * spec.heads * count, spec.threads) as place:
                n, head = T.bind(place // (spec.heads * count)), T.bind(place // count % spec.heads)
                self._rows(turned, n, head, T.bind(start + place % count * rows), rows)

    def _rows(self, turned: Any, n: Any, head: Any, row: Any, rows: int) -> None:
        """The result of a few rows of queries of one head."""
        spec, lanes = self.spec, self.spec.lanes
        scores = local((rows, self.blocks * lanes), scope="global")
        for start, count, blocks in parts(self.blocks, 4):
            with T.serial(0, count) as part:
                first = T.bind(start + part * blocks)
                sums = product(
                    rows, blocks, lanes, (spec.d,),
                    lambda i, r: self.q[n, row + i, head, r],
                    lambda j, r, lane, first=first: turned[n, head, first + j, r, lane],
                )  # fmt: skip
                sums = copied(sums, rows, blocks, lanes)
                with T.serial(0, rows) as i, T.serial(0, blocks) as j, T.vectorized(0, lanes) as lane:
                    T.buffer_store(scores, sums(i, j, lane) * T.float32(spec.scale), [i, (first + j) * lanes + lane])
        factors = local((rows,), scope="global")
        with T.serial(0, rows) as i:
            most = T.bind(reduce_row(spec.t, lanes, lambda k: scores[i, k], "max"))
            with T.serial(0, self.blocks) as block, T.vectorized(0, lanes) as lane:
                place = block * lanes + lane
                T.buffer_store(scores, exp(scores[i, place] - most), [i, place])
            total = reduce_row(spec.t, lanes, lambda k: scores[i, k], "sum")
            T.buffer_store(factors, T.float32(1) / total, [i])
        for start, count, blocks in parts(spec.dv // lanes, 4):
            with T.serial(0, count) as part:
                first = T.bind(start + part * blocks)
                sums = product(
                    rows, blocks, lanes, (spec.t,),
                    lambda i, r: scores[i, r],
                    lambda j, r, lane, first=first: self.v[n, r, head, (first + j) * lanes + lane],
                )  # fmt: skip
                sums = copied(sums, rows, blocks, lanes)
                with T.serial(0, rows) as i, T.serial(0, blocks) as j, T.vectorized(0, lanes) as lane:
                    value = sums(i, j, lane) * factors[i]
                    T.buffer_store(self.out, value, [n, row + i, head, (first + j) * lanes + lane])
