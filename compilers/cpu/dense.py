"""Fully connected layers for LLVM CPUs: (m, k) times weights packed as (O/lanes, k, lanes)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import tvm
from tvm import te
from tvm.s_tir import Schedule

from .conv import epilogue, quantized
from .convspec import Step
from .intrinsics import VNNI_DOT


@dataclass(frozen=True)
class DenseSpec:
    """y[m, o] = steps(sum_k x[m, k] w[o, k]); `quantize` as in `ConvSpec`, and the result is float32 or uint8."""

    m: int
    k: int
    o: int
    lanes: int = 16
    int8: bool = False
    zero_point: int = 0
    quantize: tuple[float, int] | None = None
    steps: tuple[Step, ...] = ()
    threads: int = 1

    @property
    def out_blocks(self) -> int:
        """Blocks of output features."""
        return ceil(self.o / self.lanes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates, without the padding of the blocks."""
        return self.m * self.k * self.o


def dense(spec: DenseSpec, *, vnni: bool = False) -> tvm.tirx.PrimFunc:
    """The scheduled function; its arguments are data, weight, [zero-point correction], one buffer a step, output."""
    function = te.create_prim_func(_compute(spec)).with_attr("tirx.noalias", True)
    s = Schedule(tvm.IRModule({"main": function}))
    names = [s.get(block).name_hint for block in s.get_child_blocks(s.get_sblock("root"))]
    total, out = s.get_sblock("dense"), s.get_sblock("out")
    use_vnni = spec.int8 and vnni
    if not use_vnni:
        s.set_scope(total, 0, "local")
    m, block, lane, *reduction = s.get_loops(total)
    # Six rows by four blocks of weights keep 24 of 32 registers busy; one row reads its weights once, in any case.
    rows = next(r for r in (6, 5, 4, 3, 2, 1) if spec.m % r == 0)
    blocks = next(b for b in (4, 3, 2, 1) if spec.out_blocks % b == 0)
    m_outer, m_inner = s.split(m, [None, rows])
    block_outer, block_inner = s.split(block, [None, blocks])
    outer, inner = (reduction[:-1], reduction[-1:]) if spec.int8 else (reduction, [])
    s.reorder(m_outer, block_outer, *outer, m_inner, block_inner, lane, *inner)
    s.reverse_compute_at(out, block_outer, preserve_unit_loops=True)
    s.unroll(m_inner)
    s.unroll(block_inner)
    if spec.threads > 1:
        s.parallel(s.fuse(m_outer, block_outer))
    if not use_vnni:
        for loop in inner:
            s.unroll(loop)
        s.vectorize(lane)
    init = s.decompose_reduction(total, outer[0])
    if use_vnni:
        s.tensorize(lane, VNNI_DOT)
        s.vectorize(s.get_loops(init)[-1])
    for loop in s.get_loops(init)[-3:-1]:
        s.unroll(loop)
    if spec.o % spec.lanes == 0:
        s.vectorize(s.get_loops(out)[-1])
    if "pad" in names:
        loops = s.get_loops(s.get_sblock("pad"))
        _, vector = s.split(loops[-1], [None, spec.lanes]) if _depth(spec) % spec.lanes == 0 else (None, None)
        if vector is not None:
            s.vectorize(vector)
    return s.mod["main"]


def _depth(spec: DenseSpec) -> int:
    return ceil(spec.k / 4) * 4 if spec.int8 else spec.k


def _compute(spec: DenseSpec) -> list[te.Tensor]:
    source_dtype = "uint8" if spec.int8 and spec.quantize is None else "float32"
    source = te.placeholder((spec.m, spec.k), name="data", dtype=source_dtype)
    shape, lanes_shape = (spec.m, spec.out_blocks, spec.lanes), (spec.out_blocks, spec.lanes)
    extra: list[te.Tensor] = []
    if spec.int8:
        data = _quantized_rows(spec, source)
        rk, rj = te.reduce_axis((0, _depth(spec) // 4), "rk"), te.reduce_axis((0, 4), "rj")
        weight = te.placeholder((spec.out_blocks, _depth(spec) // 4, spec.lanes, 4), name="weight", dtype="int8")
        extra.append(te.placeholder(lanes_shape, name="correction", dtype="int32"))
        total = te.compute(
            shape,
            lambda m, b, o: te.sum(
                data[m, rk * 4 + rj].astype("int32") * weight[b, rk, o, rj].astype("int32"), axis=[rk, rj]
            ),
            name="dense",
        )
    else:
        rk = te.reduce_axis((0, spec.k), "rk")
        weight = te.placeholder((spec.out_blocks, spec.k, spec.lanes), name="weight")
        total = te.compute(shape, lambda m, b, o: te.sum(source[m, rk] * weight[b, rk, o], axis=[rk]), name="dense")
    out_dtype = "uint8" if any(step.op == "quantize" for step in spec.steps) else "float32"
    # Steps see (n, block, y, x, lane); tensors added to a dense layer are plain (m, o).
    buffers, finish = epilogue(spec.steps, lanes_shape, (spec.m, spec.out_blocks, 1, 1, spec.lanes), out_dtype)

    def last(m: Any, o: Any) -> Any:
        block, lane = te.indexdiv(o, spec.lanes), te.indexmod(o, spec.lanes)
        value = total[m, block, lane]
        if extra:
            value = (value + extra[0][block, lane]).astype("float32")
        return finish(value, m, block, 0, 0, lane)

    out = te.compute((spec.m, spec.o), last, name="out")
    return [source, weight, *extra, *buffers, out]


def _quantized_rows(spec: DenseSpec, source: te.Tensor) -> te.Tensor:
    if spec.quantize is None and spec.k % 4 == 0:
        return source
    zero = tvm.tirx.const(spec.zero_point, "uint8")

    def value(m: Any, k: Any) -> Any:
        inside = source[m, k]
        if spec.quantize is not None:
            inside = quantized(inside, spec.quantize[0], spec.quantize[1])
        return te.if_then_else(k < spec.k, inside, zero) if spec.k % 4 else inside

    return te.compute((spec.m, _depth(spec)), value, name="pad")
