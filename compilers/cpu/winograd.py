"""3x3 convolutions of stride 1 by Winograd's minimal filtering: m x m outputs from (m + 2)**2 products a channel.

A tile d of alpha x alpha inputs (alpha = m + 2) and the filter g become B'dB and GgG', are multiplied element by
element and summed over the input channels (alpha**2 matrix products), and A'[...]A gives m x m outputs: F(2x2, 3x3)
and F(4x4, 3x3) of Lavin and Gray 2015. Multiplications fall to 1/2.25 and 1/4 of the direct form's. Tiles are processed
in chunks whose transformed inputs and products stay in the cache.

In float32 the outputs differ from the direct form's by about 1e-5 of the largest. Of bytes they are exact: every row of
G is multiplied by the least number that makes it whole, so that GgG' (at most 49 * 128) and B'dB (at most 100 * 255)
are whole numbers of 16 bits, and the columns of A' by what makes all products alike. The sums are then 4 or 576 times
those of the direct form, modulo 2**32: for F(4x4), 576 = 64 * 9, a product with the inverse of 9 modulo 2**32 and a
shift by 6 bits give the sum wherever it has 26 bits, whatever overflowed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm.tirx.script import builder as T

from .convspec import ConvSpec
from .emit import Registers, argument, dot_product, kernel, local, loop, product, view, when
from .epilogue import epilogue_buffers, finish, store_bytes, stores_bytes
from .frame import Source
from .machine import Dot
from .narrow import TOGETHER
from .tiles import WinogradTile, whole_chunks

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
# What makes every row of G whole.
_SCALES = {2: (1, 2, 2, 1), 4: (4, 6, 6, 24, 24, 1)}
_INVERSE_OF_9 = 0x38E38E39


def winograd_weight(spec: ConvSpec, weight: NDArray[Any], m: int, pairs: Dot) -> NDArray[Any]:
    """(o, c/groups, 3, 3) to GgG' as (alpha**2, blocks, input blocks of a group, lanes in, lanes out) float32.

    Of int8 weights it is (..., lanes in / depth, lanes out, depth) int16, the depth that of `pairs`.
    """
    g, lanes = np.array(_G[m]), spec.lanes
    if spec.int8:
        g = np.rint(g * np.array(_SCALES[m])[:, None])
    filled = np.zeros((spec.out_blocks * lanes, spec.group_blocks * lanes, 9), np.float32)
    filled[: weight.shape[0], : weight.shape[1]] = weight.reshape(*weight.shape[:2], 9)
    # In the order of the result first, so that one product of matrices writes it.
    depth = pairs.depth if spec.int8 else 1
    parts = filled.reshape(spec.out_blocks, lanes, spec.group_blocks, lanes // depth, depth, 9)
    ordered = np.ascontiguousarray(parts.transpose(5, 0, 2, 3, 1, 4))
    u = np.kron(g, g).astype(np.float32) @ ordered.reshape(9, -1)  # whole numbers of bytes are exact in float32
    inner = (lanes // depth, lanes, depth) if spec.int8 else (lanes, lanes)
    u = u.reshape((m + 2) ** 2, spec.out_blocks, spec.group_blocks, *inner)
    return u.astype(np.int16) if spec.int8 else u


def winograd(spec: ConvSpec, tile: WinogradTile, pairs: Dot) -> tvm.tirx.PrimFunc:
    """The function of (data, [1 / scale and zero point], weight, one buffer a step, output).

    Args:
        spec: A convolution that `winograd_sizes` permits.
        tile: How the work is cut.
        pairs: How the CPU multiplies 16 bits, for int8.
    """
    with kernel() as (emitted, body):
        body(_Winograd(spec, tile, pairs).body)
    return emitted.function


class _Winograd:
    def __init__(self, spec: ConvSpec, tile: WinogradTile, pairs: Dot) -> None:
        self.spec, self.tile, self.pairs = spec, tile, pairs
        self.alpha = tile.m + 2
        self.rows, self.columns = ceil(spec.oh / tile.m), ceil(spec.ow / tile.m)
        self.count = spec.n * self.rows * self.columns
        self.chunks = ceil(self.count / tile.chunk)
        lanes, depth = spec.lanes, pairs.depth
        # What is read: integers less their zero point, framed; floats as they are.
        self.source = Source(replace(spec, dot=pairs) if spec.int8 else replace(spec, padding=(0, 0, 0, 0)))
        inner = (lanes // depth, lanes, depth) if spec.int8 else (lanes, lanes)
        self.kind, self.words = ("int32", "int16") if spec.int8 else ("float32", "float32")
        self.weight = argument("weight", (self.alpha**2, spec.out_blocks, spec.group_blocks, *inner), self.words)
        out_shape = (spec.n, spec.out_blocks, spec.oh, spec.ow, lanes)
        shapes = epilogue_buffers(spec.steps, (spec.out_blocks, lanes), out_shape)
        self.extra = [argument(name, shape) for name, shape in shapes]
        self.out = argument("out", out_shape, spec.out_dtype)

    def body(self) -> None:
        self.source.open()
        spec, m = self.spec, self.tile.m
        # A row of a tile is stored at once where all of it exists.
        together = m == TOGETHER and spec.ow % m == 0 and stores_bytes(spec)
        rows = (spec.n, spec.out_blocks, spec.oh, spec.ow * spec.lanes)
        self.bytes = view(self.out, rows, "uint8") if together else None
        if spec.int8:
            self.frame = self.source.frame(spec.n, self.rows * m + 2, self.columns * m + 2)
            each = spec.n >= spec.threads  # an image each, or the rows of one
            with loop(spec.n, spec.threads if each else 1) as n:
                self.source.copy(self.frame, n, n, 0, 0, 1 if each else spec.threads)
        # Threads take whole chunks, or share the stages of each where there are too few of them.
        many = whole_chunks(self.chunks, spec.threads)
        with loop(self.chunks, spec.threads if many else 1) as chunk:
            self.chunk(chunk, 1 if many else spec.threads)

    def chunk(self, chunk: Any, threads: int) -> None:
        """The three stages of one chunk of tiles."""
        spec, lanes, alpha = self.spec, self.spec.lanes, self.alpha
        size = self.tile.chunk
        # An odd number of vectors apart: at powers of two the alpha**2 matrices would share the same cache sets.
        self.v = local((spec.in_blocks, alpha * alpha, size | 1, lanes), self.words)
        self.product = local((spec.out_blocks, alpha * alpha, size | 1, lanes), self.kind)
        with loop(spec.in_blocks * size, threads) as place:
            t = T.bind(place % size)
            self.forward(T.bind(place // size), t, *self.place(chunk * size + t))
        outer = spec.out_blocks // self.tile.blocks
        with loop(alpha * alpha * outer, threads) as place, loop(size // self.tile.tiles) as t:
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
        spec, m, alpha, lanes = self.spec, self.tile.m, self.alpha, self.spec.lanes
        if spec.int8:
            self.transform(block, t, lambda y, x, i: self.frame[n, block, ty * m + y, (tx * m + x) * lanes + i])
            return
        data = self.source.data
        top, left = T.bind(ty * m - spec.padding[0]), T.bind(tx * m - spec.padding[1])
        rows = T.And(top >= 0, top + alpha <= spec.h)
        whole = T.And(rows, T.And(left >= 0, left + alpha <= spec.w))

        def bounded() -> None:
            # Read a pixel that exists, and take zero where it is not the one that was meant: no branch. The clamped
            # indices come from memory, because the simplifier would undo the clamp where the other condition holds, and
            # the pixel is read wherever it is.
            at = local((2, alpha), "int32")
            for i in range(alpha):
                T.buffer_store(at, _clamp(top + i, spec.h), [0, i])
                T.buffer_store(at, _clamp(left + i, spec.w), [1, i])

            def load(y: int, x: int, lane: Any) -> Any:
                row, column = top + y, left + x
                value = T.bind(data[n, block, at[0, y], at[1, x] * lanes + lane])
                good = T.And(T.And(row >= 0, row < spec.h), T.And(column >= 0, column < spec.w))
                return T.Select(good, value, T.float32(0))

            self.transform(block, t, load)

        with T.If(whole):
            with T.Then():
                self.transform(block, t, lambda y, x, i: data[n, block, top + y, (left + x) * lanes + i])
            with T.Else():
                bounded()

    def transform(self, block: Any, t: Any, load: Callable[[int, int, Any], Any]) -> None:
        """B'dB of the tile that `load` reads, in registers and to memory."""
        m, alpha = self.tile.m, self.alpha
        half = Registers((alpha, alpha, self.spec.lanes), self.words)
        with T.vectorized(0, self.spec.lanes) as lane:
            for x in range(alpha):
                for a, value in enumerate(_forward(m, [T.bind(load(y, x, lane)) for y in range(alpha)], self.words)):
                    half.store(value, a, x, lane)
            for a in range(alpha):
                for e, value in enumerate(_forward(m, [half[a, x, lane] for x in range(alpha)], self.words)):
                    T.buffer_store(self.v, value, [block, a * alpha + e, t, lane])

    def multiply(self, e: Any, block: Any, t: Any) -> None:
        """One register tile of one of the alpha**2 matrix products."""
        spec, tile, lanes = self.spec, self.tile, self.spec.lanes
        first = T.bind(block // (spec.out_blocks // spec.groups) * spec.group_blocks)
        if spec.int8:
            sums = dot_product(
                tile.tiles, tile.blocks, lanes, (spec.group_blocks, lanes // self.pairs.depth),
                lambda i, rb, ri: (self.v, (first + rb, e, t + i, ri * self.pairs.depth)),
                lambda j, rb, ri: (self.weight, (e, block + j, rb, ri)), self.pairs,
            )  # fmt: skip
        else:
            sums = product(
                tile.tiles, tile.blocks, lanes, (spec.group_blocks, lanes),
                lambda i, rb, ri: self.v[first + rb, e, t + i, ri],
                lambda j, rb, ri, lane: self.weight[e, block + j, rb, ri, lane],
            )  # fmt: skip
        with T.vectorized(0, lanes) as lane:
            for j in range(tile.blocks):
                for i in range(tile.tiles):
                    T.buffer_store(self.product, sums(i, j, lane), [block + j, e, t + i, lane])

    def descaled(self, value: Any) -> Any:
        """The sum itself as float32: of integers it is still 4 or 576 times as large, modulo 2**32."""
        if not self.spec.int8:
            return value
        # TVM says to LLVM that signed sums do not overflow. Where they do they wrap like any others, because nothing is
        # compared or widened before this shift, and the product with the inverse keeps LLVM from cancelling it.
        whole = value if self.tile.m == 2 else value * T.int32(_INVERSE_OF_9)
        return T.cast(T.shift_right(whole, T.int32(2 if self.tile.m == 2 else 6)), "float32")

    def backward(self, block: Any, t: Any, p: Any) -> None:
        """A'[...]A of one tile and one block of channels, and the epilogue."""
        spec, m, alpha = self.spec, self.tile.m, self.alpha
        half, result = Registers((m, alpha, spec.lanes), self.kind), local((m, m, spec.lanes))
        with T.vectorized(0, spec.lanes) as lane:
            for x in range(alpha):
                column = [T.bind(self.product[block, y * alpha + x, t, lane]) for y in range(alpha)]
                for y, value in enumerate(_backward(m, column, self.kind)):
                    half.store(value, y, x, lane)
            for y in range(m):
                for x, value in enumerate(_backward(m, [half[y, e, lane] for e in range(alpha)], self.kind)):
                    T.buffer_store(result, self.descaled(value), [y, x, lane])
        image = self.rows * self.columns
        n, top, left = T.bind(p // image), T.bind(p % image // self.columns * m), T.bind(p % self.columns * m)
        surplus = self.chunks * self.tile.chunk > self.count

        def store_row(y: Any) -> None:
            lane = T.ramp(0, 1, spec.lanes)
            places = [(n, block, top + y, left + x, lane) for x in range(m)]
            values = [result[y, x, lane] for x in range(m)]
            store_bytes(spec.steps, self.extra, self.bytes, values, (block, lane), places, spec.lanes)

        def store(y: Any, x: Any) -> None:
            with T.vectorized(0, spec.lanes) as lane:
                place = (n, block, top + y, left + x, lane)
                value = finish(spec.steps, self.extra, result[y, x, lane], (block, lane), place)
                T.buffer_store(self.out, value, list(place))

        exists = [p < self.count] if surplus else []
        if self.bytes is not None:
            with T.serial(0, m) as y:
                when([*exists, *([top + y < spec.oh] if spec.oh % m else [])], lambda: store_row(y))
            return
        with T.serial(0, m) as y, T.serial(0, m) as x:
            conditions = [*exists, *([top + y < spec.oh] if spec.oh % m else [])]
            conditions += [left + x < spec.ow] if spec.ow % m else []
            when(conditions, lambda: store(y, x))


def _forward(m: int, d: Sequence[Any], dtype: str) -> list[Any]:
    """B' times a column, with what its rows have in common computed once."""
    if m == 2:
        return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]
    two, four, five = (tvm.tirx.const(k, dtype) for k in (2, 4, 5))
    a, b = T.bind(d[4] - four * d[2]), T.bind(d[3] - four * d[1])
    c, e = T.bind(d[4] - d[2]), T.bind(d[3] - d[1])
    return [
        four * d[0] + d[4] - five * d[2], a + b, a - b, c + two * e, c - two * e, four * d[1] + d[5] - five * d[3],
    ]  # fmt: skip


def _backward(m: int, v: Sequence[Any], dtype: str) -> list[Any]:
    """A' times a column; of integers, with its columns multiplied by 2 and 24 over the scales of G."""
    if m == 2:
        if dtype == "int32":
            a, b = T.bind(v[0] + v[0]), T.bind(v[3] + v[3])
            return [a + v[1] + v[2], v[1] - v[2] - b]
        return [v[0] + v[1] + v[2], v[1] - v[2] - v[3]]
    a, b = T.bind(v[1] + v[2]), T.bind(v[1] - v[2])
    c, d = T.bind(v[3] + v[4]), T.bind(v[3] - v[4])
    if dtype == "int32":
        a, b = T.bind(_times(a, 2)), T.bind(_times(b, 2))
        six, last = v[0] + _times(v[0], 1), _times(v[5] + _times(v[5], 1), 3)
        return [_times(six, 1) + a + c, b + _times(d, 1), a + _times(c, 2), b + _times(d, 3) + last]
    return [v[0] + a + c, b + T.float32(2) * d, a + T.float32(4) * c, b + T.float32(8) * d + v[5]]


def _times(value: Any, bits: int) -> Any:
    """value * 2**bits by a shift: multiplications of 32 bits take AVX2 twice as long."""
    return T.shift_left(value, T.int32(bits))


def _clamp(index: Any, extent: int) -> Any:
    return T.max(T.min(index, extent - 1), 0)
