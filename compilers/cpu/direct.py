"""Convolutions on blocked tensors for LLVM CPUs, written loop by loop: the direct form.

Data are (n, C/lanes, h, w, lanes) and weights (O/lanes, C/lanes, kh, kw, lanes in, lanes out): one vector of output
channels is summed in registers for a tile of pixels, and the epilogue runs while the tile is still there. The output is
cut into strips whose input stays in the second level of cache; within a strip a panel of weights is used for all its
pixels while it is in the first, which is why a long sum is cut into chunks. Where data must be framed with zeros,
quantised or widened, a strip's input is copied once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product as product_of
from math import ceil
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from .convspec import EXPONENTIAL_STEPS, ConvSpec, weight_type
from .emit import Sums, argument, copied, cover, dot_product, importing, kernel, local, loop, product, view
from .epilogue import epilogue_buffers, finish, store_bytes, stores_bytes
from .frame import Source
from .narrow import TOGETHER, starts
from .tiles import Tile


def convolution(spec: ConvSpec, tile: Tile) -> tvm.tirx.PrimFunc:
    """The function of (data, [1 / scale and zero point], weight, [correction], one buffer a step, output)."""
    with kernel() as (emitted, body):
        body(importing(spec.dot, spec.lanes, _Direct(spec, tile).body))
    return emitted.function


@dataclass(frozen=True)
class _Strip:
    """Output rows and columns from (y, x) on, of image n; `frame` is the copy of its input, None where none is made."""

    n: Any
    y: Any
    x: Any
    rows: int
    columns: int
    frame: Any


class _Direct:
    def __init__(self, spec: ConvSpec, tile: Tile) -> None:
        self.spec, self.tile = spec, tile
        lanes, blocks, dot = spec.lanes, spec.out_blocks, spec.dot
        # A 1x1 convolution of whole images is a matrix product over all pixels; rows have no meaning.
        self.oh, self.ow = (1, spec.oh * spec.ow) if spec.flat else (spec.oh, spec.ow)
        self.source = Source(spec)
        depth = dot.depth if dot else 1
        inner = (lanes, depth) if dot else (lanes,)
        shape = (blocks, spec.group_blocks, *spec.taps, spec.reduce_lanes // depth, *inner)
        self.weight = argument("weight", shape, weight_type(dot))
        self.correction = argument("correction", (blocks, lanes), "int32") if spec.corrected else None
        out_shape = (spec.n, blocks, spec.oh, spec.ow, lanes)
        shapes = epilogue_buffers(spec.steps, (blocks, lanes), out_shape)
        self.extra = [argument(name, shape) for name, shape in shapes]
        self.out = argument("out", out_shape, spec.out_dtype)

    def body(self) -> None:
        spec, out_shape = self.spec, (self.spec.n, self.spec.out_blocks, self.oh, self.ow, self.spec.lanes)
        self.source.open()
        if spec.flat:
            self.extra = [b if len(b.shape) < 3 else view(b, out_shape, "float32") for b in self.extra]
            self.out = view(self.out, out_shape, spec.out_dtype)
        together = self.tile.ow >= TOGETHER and stores_bytes(spec)
        # Pixels of a row as one, so that several are stored at once.
        self.bytes = view(self.out, (*out_shape[:3], self.ow * spec.lanes), "uint8") if together else None
        group_out = spec.out_blocks // spec.groups
        panels = ceil(group_out / self.tile.blocks) * spec.groups
        if spec.threads > 1 and self.tile.split_blocks and panels >= spec.threads:
            with T.serial(0, spec.n) as n:
                strip = self._strip(n, 0, 0, self.oh, self.ow, spec.threads)
                self._panels(strip, spec.threads)
            return
        extent = self.ow if spec.flat else self.oh
        strips = ceil(extent / (self.tile.strip or extent))
        if spec.threads > 1 and spec.n % spec.threads:
            strips = min(ceil(strips / spec.threads) * spec.threads, extent)
        unit = self.tile.ow if spec.flat else self.tile.oh
        size = extent if strips == 1 else min(ceil(ceil(extent / strips) / unit) * unit, extent)
        with loop(spec.n * strips, spec.threads) as task:
            # Strips have one size: the last one begins early enough, and computes a few pixels once more.
            start = T.bind(T.min(task % strips * size, extent - size)) if strips > 1 else 0
            n = T.bind(task // strips) if strips > 1 else task
            y, x, rows, columns = (0, start, 1, size) if spec.flat else (start, 0, size, self.ow)
            self._panels(self._strip(n, y, x, rows, columns, 1), 1)

    def _strip(self, n: Any, y: Any, x: Any, rows: int, columns: int, threads: int) -> _Strip:
        frame = None
        if self.source.picked:
            frame = self.source.frame(1, rows, columns)
            self.source.pick(frame, n, y, threads)
        elif self.source.framed:
            (sh, sw), (dh, dw), (kh, kw) = self.spec.stride, self.spec.dilation, self.spec.kernel
            if self.spec.in_rows:  # the last step of a row reads on where the kernel has ended
                kw = self.spec.taps[1] * self.spec.reduce_lanes
            high = (rows - 1) * sh + (kh - 1) * dh + 1
            wide = columns if self.spec.flat else (self.ow - 1) * sw + (kw - 1) * dw + 1
            frame = self.source.frame(1, high, wide)
            self.source.copy(frame, 0, n, y * sh if isinstance(y, int) else T.bind(y * sh), x, threads)
        return _Strip(n, y, x, rows, columns, frame)

    def _panels(self, strip: _Strip, threads: int) -> None:
        """All output channels of a strip."""
        spec, blocks = self.spec, self.tile.blocks
        group_out = spec.out_blocks // spec.groups
        count = ceil(group_out / blocks)
        with loop(spec.groups * count, threads) as place:
            group = T.bind(place // count) if spec.groups > 1 else 0
            first = place % count * blocks
            # The last panel begins early enough, as in `cover`.
            block = T.bind(group * group_out + (T.min(first, group_out - blocks) if group_out % blocks else first))
            self._panel(strip, block, group * spec.group_blocks)

    def _panel(self, strip: _Strip, block: Any, first: Any) -> None:
        """A few blocks of output channels of a strip."""
        spec, lanes, tile = self.spec, self.spec.lanes, self.tile
        depth = min(tile.depth or spec.group_blocks, spec.group_blocks)
        if depth == spec.group_blocks:
            with self._tiles(strip) as (_, y, x):
                self._store(strip, block, y, x, self._sums(strip, block, first, y, x, 0, depth, self._first(block)))
            return
        count = ceil(strip.rows / tile.oh) * ceil(strip.columns / tile.ow)
        kind = "int32" if spec.int8 else "float32"
        partial = local((count, tile.oh * tile.ow, tile.blocks, lanes), kind)
        first_of = self._first(block) or (lambda i, j, lane: tvm.tirx.const(0, kind))
        with T.serial(0, count) as number, T.vectorized(0, lanes) as lane:
            for i in range(tile.oh * tile.ow):
                for j in range(tile.blocks):
                    T.buffer_store(partial, first_of(i, j, lane), [number, i, j, lane])
        # Chunks of one size: what the last one has too many would count twice.
        depth = max(size for size in range(1, depth + 1) if spec.group_blocks % size == 0)
        with loop(spec.group_blocks // depth) as chunk, self._tiles(strip) as (number, y, x):
            sums = self._sums(
                strip, block, first, y, x, T.bind(chunk * depth), depth,
                lambda i, j, lane: partial[number, i, j, lane],
            )  # fmt: skip
            with T.vectorized(0, lanes) as lane:
                for i in range(tile.oh * tile.ow):
                    for j in range(tile.blocks):
                        T.buffer_store(partial, sums(i, j, lane), [number, i, j, lane])
        with self._tiles(strip) as (number, y, x):
            self._store(strip, block, y, x, lambda i, j, lane: partial[number, i, j, lane])

    @contextmanager
    def _tiles(self, strip: _Strip) -> Iterator[tuple[Any, Any, Any]]:
        """Every tile of pixels of a strip: its number, row and column."""
        with cover(strip.rows, self.tile.oh) as (row, y), cover(strip.columns, self.tile.ow) as (column, x):
            yield row * ceil(strip.columns / self.tile.ow) + column, y, x

    def _sums(self, strip: _Strip, block: Any, first: Any, y: Any, x: Any, chunk: Any, depth: int, start: Any) -> Sums:
        """The sums of the tile at (y, x) of a strip over a chunk of the input blocks, from `start` on, in registers."""
        spec, lanes, dot, tile = self.spec, self.spec.lanes, self.spec.dot, self.tile
        (sh, sw), (dh, dw) = (1, 1) if self.source.picked else spec.stride, spec.dilation
        if spec.in_rows:
            dw = spec.reduce_lanes

        def left(i: int, rb: Any, ky: Any, kx: Any, ri: Any) -> Any:
            iy, ix = divmod(i, tile.ow)
            if strip.frame is None:
                source, image, row, column = self.source.data, strip.n, strip.y + y + iy, strip.x + x + ix
            else:
                source, image, row, column = strip.frame, 0, y + iy, x + ix
            place = (column * sw + kx * dw) * spec.in_lanes + ri * (dot.depth if dot else 1)
            indices = (image, first + chunk + rb, row * sh + ky * dh, place)
            return (source, indices) if dot else source[indices]

        sizes = (depth, *spec.taps, spec.reduce_lanes // (dot.depth if dot else 1))
        pixels = tile.oh * tile.ow
        if dot:
            return dot_product(
                pixels, tile.blocks, lanes, sizes, left,
                lambda j, rb, ky, kx, ri: (self.weight, (block + j, chunk + rb, ky, kx, ri)), dot, start,
            )  # fmt: skip
        return product(
            pixels, tile.blocks, lanes, sizes, left,
            lambda j, rb, ky, kx, ri, lane: self.weight[block + j, chunk + rb, ky, kx, ri, lane], start,
        )  # fmt: skip

    def _first(self, block: Any) -> Any:
        """Where sums begin: at what the zero point of the data takes from them."""
        correction = self.correction
        return None if correction is None else lambda i, j, lane: correction[block + j, lane]

    def _store(self, strip: _Strip, block: Any, y: Any, x: Any, sums: Sums) -> None:
        """The epilogue of a tile."""
        spec, tile, lanes = self.spec, self.tile, self.spec.lanes

        def place(j: Any, iy: Any, ix: Any) -> tuple[Any, ...]:
            return strip.n, block + j, strip.y + y + iy, strip.x + x + ix

        def store(i: Any, j: Any, iy: Any, ix: Any, lane: Any) -> None:
            value = T.cast(sums(i, j, lane), "float32") if spec.int8 else sums(i, j, lane)
            at = (*place(j, iy, ix), lane)
            T.buffer_store(self.out, finish(spec.steps, self.extra, value, (block + j, lane), at), list(at))

        if any(step.op in EXPONENTIAL_STEPS for step in spec.steps):  # long code once, not for every register
            kind = "int32" if spec.int8 else "float32"
            sums = copied(sums, tile.oh * tile.ow, tile.blocks, lanes, kind)
            rows, columns = T.serial(0, tile.oh), T.serial(0, tile.ow)
            with T.serial(0, tile.blocks) as j, rows as iy, columns as ix, T.vectorized(0, lanes) as lane:
                store(iy * tile.ow + ix, j, iy, ix, lane)
            return
        if self.bytes is not None:
            lane = T.ramp(0, 1, lanes)
            for j, iy, start in product_of(range(tile.blocks), range(tile.oh), starts(tile.ow)):
                places = [(*place(j, iy, start + k), lane) for k in range(TOGETHER)]
                values = [sums(iy * tile.ow + start + k, j, lane) for k in range(TOGETHER)]
                values = [T.cast(value, f"float32x{lanes}") for value in values] if spec.int8 else values
                store_bytes(spec.steps, self.extra, self.bytes, values, (block + j, lane), places, lanes)
            return
        with T.vectorized(0, lanes) as lane:
            for j in range(tile.blocks):
                for iy in range(tile.oh):
                    for ix in range(tile.ow):
                        store(iy * tile.ow + ix, j, iy, ix, lane)
