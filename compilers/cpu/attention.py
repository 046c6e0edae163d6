"""Scaled dot-product attention for LLVM CPUs (Vaswani et al. 2017), a few rows of queries at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from .emit import argument, cover, kernel, local, loop, product, view
from .functions import exp
from .machine import Machine
from .rows import reduce_row


@dataclass(frozen=True)
class Strided:
    """Where an operand lies inside of a larger value.

    Attributes:
        shape: Of that value.
        offset: Where the operand's first element is, in elements.
        strides: How far neighbours along every axis of the operand are apart, in elements.
    """

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class AttentionSpec:
    """softmax(scale q k') v: q and the result (n, s, heads, d), k (n, t, heads, d) and v (n, t, heads, dv).

    `d` may be anything; `dv` is a multiple of `lanes`. `places` says where q, k and v lie in what is passed for them;
    without it they are values of their own. Neighbours of v's last axis have to be neighbours in memory.
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
    places: tuple[Strided, Strided, Strided] | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of q, k and v."""
        ends = ((self.s, self.d), (self.t, self.d), (self.t, self.dv))
        return tuple((self.n, rows, self.heads, width) for rows, width in ends)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the two products."""
        return self.n * self.heads * self.s * self.t * (self.d + self.dv)


def attention(spec: AttentionSpec, machine: Machine) -> tvm.tirx.PrimFunc:
    """The function of (q, k, v, output), or of the values that q, k and v lie in."""
    with kernel() as (emitted, body):
        body(_Attention(spec, machine).body)
    return emitted.function


class _Attention:
    def __init__(self, spec: AttentionSpec, machine: Machine) -> None:
        self.spec = spec
        self.blocks = ceil(spec.t / spec.lanes)
        given = [place.shape for place in spec.places] if spec.places else spec.shapes
        self.arguments = [argument(name, shape) for name, shape in zip("qkv", given, strict=True)]
        self.out = argument("out", (spec.n, spec.s, spec.heads, spec.dv))
        # Rows of queries whose scores are kept at once, and blocks of keys or values beside them in registers.
        self.width = min(4 if machine.registers >= 32 else 2, self.blocks, spec.dv // spec.lanes)
        self.rows = min(6, spec.s)

    def body(self) -> None:
        spec = self.spec
        self.q, self.k, self.v = (self._reader(number) for number in range(3))
        # Keys are turned once, so that one vector holds the same component of neighbouring keys.
        turned = local((spec.n, spec.heads, self.blocks, spec.d, spec.lanes))
        with loop(spec.n * spec.heads * self.blocks, spec.threads) as place:
            n, head = T.bind(place // (spec.heads * self.blocks)), T.bind(place // self.blocks % spec.heads)
            block = T.bind(place % self.blocks)
            with T.serial(0, spec.d) as d, T.serial(0, spec.lanes) as lane:
                # What fills the last block repeats the last key; its scores are not used.
                key = T.min(block * spec.lanes + lane, spec.t - 1)
                T.buffer_store(turned, self.k(n, key, head, d), [n, head, block, d, lane])
        count = ceil(spec.s / self.rows)
        with loop(spec.n * spec.heads * count, spec.threads) as place:
            n, head = T.bind(place // (spec.heads * count)), T.bind(place // count % spec.heads)
            # The last rows begin early enough, as in `cover`.
            row = T.bind(T.min(place % count * self.rows, spec.s - self.rows))
            self._rows(turned, n, head, row)

    def _reader(self, number: int) -> Callable[..., Any]:
        """Reads q, k or v (0, 1, 2) at (n, row, head, component)."""
        buffer = self.arguments[number]
        if self.spec.places is None:
            return lambda *place: buffer[place]
        at = self.spec.places[number]
        flat = view(buffer, (prod(at.shape),), "float32")
        return lambda *place: flat[at.offset + sum(i * stride for i, stride in zip(place, at.strides, strict=True))]

    def _rows(self, turned: Any, n: Any, head: Any, row: Any) -> None:
        """The result of a few rows of queries of one head."""
        spec, lanes, rows, blocks = self.spec, self.spec.lanes, self.rows, self.width
        scores = local((rows, self.blocks * lanes))
        with cover(self.blocks, blocks) as (_, first):
            sums = product(
                rows, blocks, lanes, (spec.d,),
                lambda i, r: self.q(n, row + i, head, r), lambda j, r, lane: turned[n, head, first + j, r, lane],
            )  # fmt: skip
            with T.vectorized(0, lanes) as lane:
                for i in range(rows):
                    for j in range(blocks):
                        value = sums(i, j, lane) * T.float32(spec.scale)
                        T.buffer_store(scores, value, [i, (first + j) * lanes + lane])
        factors = local((rows,))
        with T.serial(0, rows) as i:
            most = T.bind(reduce_row(spec.t, lanes, lambda k: scores[i, k], "max"))
            with T.serial(0, self.blocks) as block, T.vectorized(0, lanes) as lane:
                place = block * lanes + lane
                T.buffer_store(scores, exp(scores[i, place] - most), [i, place])
            total = reduce_row(spec.t, lanes, lambda k: scores[i, k], "sum")
            T.buffer_store(factors, T.float32(1) / total, [i])
        with cover(spec.dv // lanes, blocks) as (_, first):
            sums = product(
                rows, blocks, lanes, (spec.t,),
                lambda i, r: scores[i, r], lambda j, r, lane: self.v(n, r, head, (first + j) * lanes + lane),
            )  # fmt: skip
            with T.vectorized(0, lanes) as lane:
                for i in range(rows):
                    for j in range(blocks):
                        value = sums(i, j, lane) * factors[i]
                        T.buffer_store(self.out, value, [n, row + i, head, (first + j) * lanes + lane])
