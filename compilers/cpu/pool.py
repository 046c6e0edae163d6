"""Pooling and global means on blocked tensors for LLVM CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import te
from tvm.s_tir import Schedule


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

    reduce = te.max if spec.maximum else te.sum
    shape = (spec.n, spec.blocks, *spec.out, spec.lanes)
    total = te.compute(shape, lambda n, b, y, x, i: reduce(window(n, b, y, x, i), axis=[ky, kx]), name="pool")

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
    s.set_scope(total_block, 0, "local")
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


def global_mean(n: int, c: int, h: int, w: int, lanes: int) -> tvm.tirx.PrimFunc:
    """The scheduled function of (data (n, blocks, h, w, lanes), output (n, c))."""
    blocks = -(-c // lanes)
    data = te.placeholder((n, blocks, h, w, lanes), name="data")
    ky, kx = te.reduce_axis((0, h), "ky"), te.reduce_axis((0, w), "kx")
    total = te.compute((n, blocks, lanes), lambda m, b, i: te.sum(data[m, b, ky, kx, i], axis=[ky, kx]), name="total")
    factor = tvm.tirx.const(1.0 / (h * w), "float32")
    out = te.compute((n, c), lambda m, o: total[m, te.indexdiv(o, lanes), te.indexmod(o, lanes)] * factor, name="out")
    s = Schedule(tvm.IRModule({"main": te.create_prim_func([data, out]).with_attr("tirx.noalias", True)}))
    block = s.get_sblock("total")
    m, b, lane, *reduction = s.get_loops(block)
    s.reorder(m, b, *reduction, lane)
    # Four partial sums would hide the adder's latency, but a global mean is under 2 % of the networks measured.
    s.vectorize(lane)
    init = s.decompose_reduction(block, reduction[0])
    s.vectorize(s.get_loops(init)[-1])
    return s.mod["main"]
