"""Depthwise convolutions on blocked tensors for LLVM CPUs, written loop by loop.

They move more bytes than they compute, so no padded copy is made: rows and columns at the edge have code of their own
with the taps that lie inside.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.tirx.script import builder as T

from .convspec import ConvSpec
from .emit import Registers, argument, kernel, local, loop, parts, view
from .epilogue import epilogue_buffers, finish, store_bytes, stores_bytes
from .narrow import TOGETHER, starts


def depthwise(spec: ConvSpec, columns: int) -> tvm.tirx.PrimFunc:
    """The function of (data, [1 / scale and zero point], weight (blocks, kh, kw, lanes), one buffer a step, output).

    Args:
        spec: A depthwise convolution whose data are not quantised on the way.
        columns: Pixels of a row that are accumulated in registers at once.
    """
    with kernel() as (emitted, body):
        body(_Depthwise(spec, columns).body)
    return emitted.function


class _Depthwise:
    def __init__(self, spec: ConvSpec, columns: int) -> None:
        self.spec, self.columns = spec, columns
        blocks, lanes = spec.out_blocks, spec.lanes
        self.data = argument("data", (spec.n, blocks, spec.h, spec.w, lanes), "uint8" if spec.int8 else "float32")
        self.numbers = argument("input", (2,)) if spec.int8 else None
        self.weight = argument("weight", (blocks, *spec.kernel, lanes))
        out_shape = (spec.n, blocks, spec.oh, spec.ow, lanes)
        self.extra = [argument(*item) for item in epilogue_buffers(spec.steps, (blocks, lanes), out_shape)]
        self.out = argument("out", out_shape, spec.out_dtype)

    def body(self) -> None:
        spec = self.spec
        rows = (spec.n, spec.out_blocks, spec.oh, spec.ow * spec.lanes)
        self.bytes = view(self.out, rows, "uint8") if stores_bytes(spec) else None
        with loop(spec.n * spec.out_blocks, spec.threads) as place:
            n, block = T.bind(place // spec.out_blocks), T.bind(place % spec.out_blocks)
            low, high = self._inside(0)
            for y in (*range(low), *range(high, spec.oh)):
                self._row(n, block, y, self._taps(0, y))
            if high > low:
                with T.serial(0, high - low) as y:
                    self._row(n, block, T.bind(low + y), list(range(spec.kernel[0])))

    def _row(self, n: Any, block: Any, y: Any, rows: list[int]) -> None:
        low, high = self._inside(1)
        for x in (*range(low), *range(high, self.spec.ow)):
            self._tile(n, block, y, x, 1, rows, self._taps(1, x))
        for start, count, size in parts(high - low, self.columns, low):
            with T.serial(0, count) as part:
                x = T.bind(start + part * size)
                self._tile(n, block, y, x, size, rows, list(range(self.spec.kernel[1])))

    def _tile(self, n: Any, block: Any, y: Any, x: Any, size: int, rows: list[int], taps: list[int]) -> None:
        spec, lanes = self.spec, self.spec.lanes
        (sh, sw), (dh, dw) = spec.stride, spec.dilation
        sums = Registers((size, lanes))
        top, left = y * sh - spec.padding[0], x * sw - spec.padding[1]
        with T.vectorized(0, lanes) as lane:
            first = T.float32(0)
            if self.numbers is not None:
                # Sums of bytes times bytes are exact in float32: at most kh * kw * 255 * 127 < 2**24.
                for ky in rows:
                    for kx in taps:
                        first = first - self.numbers[1] * self.weight[block, ky, kx, lane]
                first = T.bind(first)
            for i in range(size):
                sums.store(first, i, lane)
            for ky in rows:
                for kx in taps:
                    weight = T.bind(self.weight[block, ky, kx, lane])
                    for i in range(size):
                        value = self.data[n, block, top + ky * dh, left + i * sw + kx * dw, lane]
                        if spec.int8:
                            value = T.cast(T.cast(value, "int32"), "float32")
                        sums.store(sums[i, lane] + value * weight, i, lane)
        if self.bytes is not None and size >= TOGETHER:
            lane = T.ramp(0, 1, lanes)
            for start in starts(size):
                places = [(n, block, y, x + start + k, lane) for k in range(TOGETHER)]
                values = [sums[start + k, lane] for k in range(TOGETHER)]
                store_bytes(spec.steps, self.extra, self.bytes, values, (block, lane), places, lanes)
            return
        done = local((size, lanes))
        with T.vectorized(0, lanes) as lane:
            for i in range(size):
                T.buffer_store(done, sums[i, lane], [i, lane])
        with T.serial(0, size) as i, T.vectorized(0, lanes) as lane:
            place = (n, block, y, x + i, lane)
            T.buffer_store(self.out, finish(spec.steps, self.extra, done[i, lane], (block, lane), place), list(place))

    def _taps(self, axis: int, position: int) -> list[int]:
        """The taps of one axis that lie inside the image for an output at that position."""
        spec = self.spec
        start = position * spec.stride[axis] - spec.padding[axis]
        extent = (spec.h, spec.w)[axis]
        return [tap for tap in range(spec.kernel[axis]) if 0 <= start + tap * spec.dilation[axis] < extent]

    def _inside(self, axis: int) -> tuple[int, int]:
        """The first output whose taps all lie inside, and the first after it whose do not; equal where none do."""
        extent = (self.spec.oh, self.spec.ow)[axis]
        whole = [p for p in range(extent) if len(self._taps(axis, p)) == self.spec.kernel[axis]]
        return (whole[0], whole[-1] + 1) if whole else (extent, extent)
