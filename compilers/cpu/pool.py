"""Pooling and global means on blocked tensors for LLVM CPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import ceil
from operator import add
from typing import Any

import tvm
from tvm import te
from tvm.s_tir import Schedule
from tvm.tirx.script import builder as T

from .emit import Registers, Sums, argument, copied, kernel, loop, parts, view, when

# Sums of a mean that do not wait for each other: an addition is ready after three or four cycles.
_WAYS = 4


@dataclass(frozen=True)
class PoolSpec:
    """Maximum or average over windows of an (n, blocks, h, w, lanes) tensor.

    `count_include_pad` divides by the whole window at the edge too; else by the pixels that are inside.
    """

    n: int
    blocks: int
    h: int
    w: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, left, bottom, right
    out: tuple[int, int]
    maximum: bool
    count_include_pad: bool = True
    lanes: int = 16
    threads: int = 1


def pool(spec: PoolSpec) -> tvm.tirx.PrimFunc:
    """The scheduled function of (data, output), output (n, blocks, oh, ow, lanes)."""
    data = te.placeholder((spec.n, spec.blocks, spec.h, spec.w, spec.lanes), name="data")
    ky, kx = te.reduce_axis((0, spec.kernel[0]), "ky"), te.reduce_axis((0, spec.kernel[1]), "kx")
    (sh, sw), (top, left, bottom, right) = spec.stride, spec.padding
    edge = tvm.tirx.min_value("float32") if spec.maximum else tvm.tirx.const(0, "float32")
    framed = bool(top or left or bottom or right) or (
        (spec.out[0] - 1) * sh + spec.kernel[0] > spec.h or (spec.out[1] - 1) * sw + spec.kernel[1] > spec.w
    )

    def window(n: Any, b: Any, y: Any, x: Any, i: Any) -> Any:
        row, column = y * sh + ky - top, x * sw + kx - left
        if not framed:
            return data[n, b, row, column, i]
        inside = te.all(row >= 0, row < spec.h, column >= 0, column < spec.w)
        return te.if_then_else(inside, data[n, b, row, column, i], edge)

    combine = te.max if spec.maximum else te.sum
    shape = (spec.n, spec.blocks, *spec.out, spec.lanes)
    total = te.compute(shape, lambda n, b, y, x, i: combine(window(n, b, y, x, i), axis=[ky, kx]), name="pool")

    def divided(n: Any, b: Any, y: Any, x: Any, i: Any) -> Any:
        value = total[n, b, y, x, i]
        if spec.maximum:
            return value
        if spec.count_include_pad or not framed:
            return value * tvm.tirx.const(1.0 / (spec.kernel[0] * spec.kernel[1]), "float32")
        rows = te.min(y * sh - top + spec.kernel[0], spec.h) - te.max(y * sh - top, 0)
        columns = te.min(x * sw - left + spec.kernel[1], spec.w) - te.max(x * sw - left, 0)
        return value / (rows * columns).astype("float32")

    out = te.compute(shape, divided, name="out")
    s = Schedule(tvm.IRModule({"main": te.create_prim_func([data, out]).with_attr("tirx.noalias", True)}))
    total_block, out_block = s.get_sblock("pool"), s.get_sblock("out")
    n, b, y, x, lane, *reduction = s.get_loops(total_block)
    s.reorder(n, b, y, x, *reduction, lane)
    s.reverse_compute_at(out_block, x, preserve_unit_loops=True)
    s.vectorize(lane)
    s.vectorize(s.get_loops(out_block)[-1])
    rows = s.fuse(n, b, y)
    if spec.threads > 1:  # before decomposing: afterwards the update is no reduction block and refuses it
        s.parallel(rows)
    init = s.decompose_reduction(total_block, reduction[0])
    s.vectorize(s.get_loops(init)[-1])
    return s.mod["main"]


@dataclass(frozen=True)
class MeanSpec:
    """The mean of every channel over its pixels: data (n, blocks, h, w, lanes) to (n, c)."""

    n: int
    c: int
    h: int
    w: int
    lanes: int = 16
    threads: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return ceil(self.c / self.lanes)


def global_mean(spec: MeanSpec) -> tvm.tirx.PrimFunc:
    """The function of (data, output)."""
    blocks, lanes, pixels = spec.blocks, spec.lanes, spec.h * spec.w
    with kernel() as (emitted, body):
        given = argument("data", (spec.n, blocks, spec.h, spec.w, lanes))
        out = argument("out", (spec.n, spec.c))

        def every_block() -> None:
            data = view(given, (spec.n, blocks, pixels * lanes), "float32")
            with loop(spec.n * blocks, spec.threads) as place:
                n, b = T.bind(place // blocks), T.bind(place % blocks)
                sums = copied(_pixel_sums(pixels, lanes, lambda at: data[n, b, at]), 1, 1, lanes)

                def store(count: int) -> None:
                    with T.vectorized(0, count) as lane:
                        value = sums(0, 0, lane) * T.float32(1.0 / pixels)
                        T.buffer_store(out, value, [n, b * lanes + lane])

                rest = spec.c % lanes
                when([b < blocks - 1] if rest else [], lambda: store(lanes), lambda: store(rest))

        body(every_block)
    return emitted.function


def _pixel_sums(pixels: int, lanes: int, value: Callable[[Any], Any]) -> Sums:
    """The sum of value(pixel * lanes + lane) over the pixels, in sums that do not wait for each other."""
    ways = min(_WAYS, pixels)
    sums = Registers((ways, lanes))
    with T.vectorized(0, lanes) as lane:
        for way in range(ways):
            sums.store(T.float32(0), way, lane)
    for start, count, size in parts(pixels, ways):
        with T.serial(0, count) as part, T.vectorized(0, lanes) as lane:
            for way in range(size):
                at = (start + part * ways + way) * lanes + lane
                sums.store(sums[way, lane] + value(at), way, lane)
    return lambda i, j, lane: reduce(add, (sums[way, lane] for way in range(ways)))
