"""3x3 convolutions of stride 1 by Winograd's minimal filtering: m x m outputs from (m + 2)**2 products a channel.

A tile d of alpha x alpha inputs (alpha = m + 2) and the filter g become B'dB and GgG', are multiplied element by
element and summed over the input channels (alpha**2 matrix products), and A'[...]A gives m x m outputs: F(2x2, 3x3)
and F(4x4, 3x3) of Lavin and Gray 2015. Multiplications fall to 1/2.25 and 1/4 of the direct form's; the outputs differ
from the direct form's by about 1e-5 of the largest. Tiles are processed in chunks whose transformed inputs and
products stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm.tirx.script import builder as T

from .conv import epilogue_buffers, finish
from .convspec import ConvSpec
from .emit import argument, kernel, local, loop, product, when
from .tiles import WinogradTile

# G by m; B and A are written out as sums below.
_G = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}


def winograd_weight(spec: ConvSpec, weight: NDArray[Any], m: int) -> NDArray[Any]:
    """(o, c/groups, 3, 3) to GgG' as (alpha**2, blocks, input blocks of a group, lanes in, lanes out) float32."""
    g = np.array(_G[m])
    filled = np.zeros((spec.out_blocks * spec.lanes, spec.group_blocks * spec.lanes, 3, 3))
    filled[: weight.shape[0], : weight.shape[1]] = weight
    u = np.einsum("ai,ocij,bj->aboc", g, filled, g, optimize=True)
    u = u.reshape((m + 2) ** 2, spec.out_blocks, spec.lanes, spec.group_blocks, spec.lanes)
    return np.ascontiguousarray(u.transpose(0, 1, 3, 4, 2).astype(np.float32))


def winograd(spec: ConvSpec, tile: WinogradTile) -> tvm.tirx.PrimFunc:
    """The function; its arguments are data, weight, one buffer a step, output."""
    with kernel() as (emitted, body):
        body(_Winograd(spec, tile).body)
    return emitted.function


class _Winograd:
    def __init__(self, spec: ConvSpec, tile: WinogradTile) -> None:
        self.spec, self.tile = spec, tile
        self.alpha = tile.m + 2
        self.rows, self.columns = ceil(spec.oh / tile.m), ceil(spec.ow / tile.m)
        self.count = spec.n * self.rows * self.columns
        self.chunks = ceil(self.count / tile.chunk)
        lanes = spec.lanes
        self.data = argument("data", (spec.n, spec.in_blocks, spec.h, spec.w, lanes))
        self.weight = argument("weight", (self.alpha**2, spec.out_blocks, spec.group_blocks, lanes, lanes))
        out_shape = (spec.n, spec.out_blocks, spec.oh, spec.ow, lanes)
        shapes = epilogue_buffers(spec.steps, (spec.out_blocks, lanes), out_shape)
        self.extra = [argument(name, shape) for name, shape in shapes]
        self.out = argument("out", out_shape, spec.out_dtype)

    def body(self) -> None:
        # Threads take whole chunks, or share the stages of each where there are too few of them.
        many = self.chunks >= 2 * self.spec.threads
        with loop(self.chunks, self.spec.threads if many else 1) as chunk:
            self.chunk(chunk, 1 if many else self.spec.threads)

    def chunk(self, chunk: Any, threads: int) -> None:
        """The three stages of one chunk of tiles."""
        spec, lanes, alpha = self.spec, self.spec.lanes, self.alpha
        size = self.tile.chunk
        # An odd number of vectors apart: at powers of two the alpha**2 matrices would share the same cache sets.
        self.v = local((spec.in_blocks, alpha * alpha, size | 1, lanes), scope="global")
        self.product = local((spec.out_blocks, alpha * alpha, size | 1, lanes), scope="global")
        with loop(spec.in_blocks * size, threads) as place:
            t = T.bind(place % size)
            self.forward(T.bind(place // size), t, *self.place(chunk * size + t))
        outer = spec.out_blocks // self.tile.blocks
        with loop(alpha * alpha * outer, threads) as place, T.serial(0, size // self.tile.tiles) as t:
            self.multiply(T.bind(place // outer), T.bind(place % outer * self.tile.blocks), t * self.tile.tiles)
        with loop(spec.out_blocks * size, threads) as place:
            t = T.bind(place % size)
            self.backward(T.bind(place // size), t, T.bind(chunk * size + t))

    def place(self, p: Any) -> tuple[Any, Any, Any]:
        """Image, row and column of a tile; what the last chunk has too many repeats the last tile."""
        p = T.bind(T.min(p, self.count - 1))
        image = self.rows * self.columns
        return T.bind(p // image), T.bind(p % image // self.columns), T.bind(p % self.columns)

    def forward(self, block: Any, t: Any, n: Any, ty: Any, tx: Any) -> None:
        """B'dB of one tile and one block of channels."""
        spec, m, alpha = self.spec, self.tile.m, self.alpha
        top, left = T.bind(ty * m - spec.padding[0]), T.bind(tx * m - spec.padding[1])
        rows = T.And(top >= 0, top + alpha <= spec.h)
        whole = T.And(rows, T.And(left >= 0, left + alpha <= spec.w))

        def emit(load: Callable[[int, int, Any], Any]) -> None:
            half = local((alpha, alpha, spec.lanes))
            with T.vectorized(0, spec.lanes) as lane:
                for x in range(alpha):
                    for a, value in enumerate(_forward(m, [T.bind(load(y, x, lane)) for y in range(alpha)])):
                        T.buffer_store(half, value, [a, x, lane])
                for a in range(alpha):
                    for e, value in enumerate(_forward(m, [half[a, x, lane] for x in range(alpha)])):
                        T.buffer_store(self.v, value, [block, a * alpha + e, t, lane])

        def plain(y: int, x: int, lane: Any) -> Any:
            return self.data[n, block, top + y, left + x, lane]

        def bounded(y: int, x: int, lane: Any) -> Any:
            # Read a pixel that exists, and take zero where it is not the one that was meant: no branch.
            row, column = top + y, left + x
            value = self.data[n, block, _clamp(row, spec.h), _clamp(column, spec.w), lane]
            good = T.And(T.And(row >= 0, row < spec.h), T.And(column >= 0, column < spec.w))
            return T.Select(good, value, T.float32(0))

        with T.If(whole):
            with T.Then():
                emit(plain)
            with T.Else():
                emit(bounded)

    def multiply(self, e: Any, block: Any, t: Any) -> None:
        """One register tile of one of the alpha**2 matrix products."""
        spec, tile, lanes = self.spec, self.tile, self.spec.lanes
        first = T.bind(block // (spec.out_blocks // spec.groups) * spec.group_blocks)
        sums = product(
            tile.tiles, tile.blocks, lanes, (spec.group_blocks, lanes),
            lambda i, rb, ri: self.v[first + rb, e, t + i, ri],
            lambda j, rb, ri, lane: self.weight[e, block + j, rb, ri, lane],
        )  # fmt: skip
        with T.vectorized(0, lanes) as lane:
            for j in range(tile.blocks):
                for i in range(tile.tiles):
                    T.buffer_store(self.product, sums[i, j, lane], [block + j, e, t + i, lane])

    def backward(self, block: Any, t: Any, p: Any) -> None:
        """A'[...]A of one tile and one block of channels, and the epilogue."""
        spec, m, alpha = self.spec, self.tile.m, self.alpha
        half, result = local((m, alpha, spec.lanes)), local((m, m, spec.lanes))
        with T.vectorized(0, spec.lanes) as lane:
            for x in range(alpha):
                column = [T.bind(self.product[block, y * alpha + x, t, lane]) for y in range(alpha)]
                for y, value in enumerate(_backward(m, column)):
                    T.buffer_store(half, value, [y, x, lane])
            for y in range(m):
                for x, value in enumerate(_backward(m, [half[y, e, lane] for e in range(alpha)])):
                    T.buffer_store(result, value, [y, x, lane])
        image = self.rows * self.columns
        n, top, left = T.bind(p // image), T.bind(p % image // self.columns * m), T.bind(p % self.columns * m)
        surplus = self.chunks * self.tile.chunk > self.count

        def store(y: Any, x: Any) -> None:
            with T.vectorized(0, spec.lanes) as lane:
                place = (n, block, top + y, left + x, lane)
                value = finish(spec.steps, self.extra, result[y, x, lane], (block, lane), place)
                T.buffer_store(self.out, value, list(place))

        with T.serial(0, m) as y, T.serial(0, m) as x:
            conditions = [p < self.count] if surplus else []
            conditions += [top + y < spec.oh] if spec.oh % m else []
            conditions += [left + x < spec.ow] if spec.ow % m else []
            when(conditions, lambda: store(y, x))


def _forward(m: int, d: Sequence[Any]) -> list[Any]:
    """B' times a column, with what its rows have in common computed once."""
    if m == 2:
        return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]
    two, four, five = T.float32(2), T.float32(4), T.float32(5)
    a, b = T.bind(d[4] - four * d[2]), T.bind(d[3] - four * d[1])
    c, e = T.bind(d[4] - d[2]), T.bind(d[3] - d[1])
    return [
        four * d[0] + d[4] - five * d[2], a + b, a - b, c + two * e, c - two * e, four * d[1] + d[5] - five * d[3],
    ]  # fmt: skip


def _backward(m: int, v: Sequence[Any]) -> list[Any]:
    """A' times a column."""
    if m == 2:
        return [v[0] + v[1] + v[2], v[1] - v[2] - v[3]]
    a, b = T.bind(v[1] + v[2]), T.bind(v[1] - v[2])
    c, d = T.bind(v[3] + v[4]), T.bind(v[3] - v[4])
    return [v[0] + a + c, b + T.float32(2) * d, a + T.float32(4) * c, b + T.float32(8) * d + v[5]]


def _clamp(index: Any, extent: int) -> Any:
    return T.max(T.min(index, extent - 1), 0)
