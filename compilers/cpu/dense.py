"""Fully connected layers for LLVM CPUs: (m, k) times weights packed as (O/lanes, k, lanes)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from .conv import epilogue_buffers, finish, quantized
from .convspec import Step
from .emit import argument, dot_product, kernel, local, loop, parts, product
from .tiles import row_tile


@dataclass(frozen=True)
class DenseSpec:
    """y[m, o] = steps(sum_k x[m, k] w[o, k]); `quantize` as in `ConvSpec`, and the result is float32 or uint8.

    Tensors of the steps `add` and `mul` are (m, o).
    """

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

    @property
    def out_dtype(self) -> str:
        """`uint8` where the last step quantises, else `float32`."""
        return "uint8" if any(step.op == "quantize" for step in self.steps) else "float32"


def dense(spec: DenseSpec, *, vnni: bool = False, registers: int = 32) -> tvm.tirx.PrimFunc:
    """The function of (data, weight, [zero-point correction], one buffer a step, output)."""
    with kernel() as (emitted, body):
        dense_ = _Dense(spec, vnni and spec.int8, registers)
        body(dense_.body)
    return emitted.function


class _Dense:
    def __init__(self, spec: DenseSpec, vnni: bool, registers: int) -> None:
        self.spec, self.vnni = spec, vnni
        lanes, blocks = spec.lanes, spec.out_blocks
        direct = not spec.int8 or spec.quantize is not None
        self.source = argument("data", (spec.m, spec.k), "float32" if direct else "uint8")
        self.depth = ceil(spec.k / 4) if spec.int8 else spec.k
        if spec.int8:
            self.weight = argument("weight", (blocks, self.depth, lanes, 4), "int8")
            self.correction = argument("correction", (blocks, lanes), "int32")
        else:
            self.weight = argument("weight", (blocks, self.depth, lanes))
        shapes = epilogue_buffers(spec.steps, (blocks, lanes), (spec.m, spec.o))
        self.extra = [argument(name, shape) for name, shape in shapes]
        self.out = argument("out", (spec.m, spec.o), spec.out_dtype)
        # The last block is a piece of its own where only some of its lanes exist.
        self.whole = spec.o // lanes
        self.rows, self.blocks = row_tile(spec.m, self.whole or 1, registers, spec.int8, spec.threads)

    def body(self) -> None:
        spec = self.spec
        self.data = self._quantised() if spec.int8 and (spec.quantize or spec.k % 4) else self.source
        columns = parts(self.whole, self.blocks)
        if spec.o % spec.lanes:
            columns.append((self.whole, 1, 1))
        for row, row_count, rows in parts(spec.m, self.rows):
            for block, block_count, blocks in columns:
                with loop(row_count * block_count, spec.threads) as tile:
                    # Rows are the inner loop: a panel of weights is read once and stays near.
                    first_block = T.bind(block + tile // row_count * blocks)
                    self._tile(T.bind(row + tile % row_count * rows), rows, first_block, blocks, block == self.whole)

    def _tile(self, row: Any, rows: int, block: Any, blocks: int, partial: bool) -> None:
        spec = self.spec
        if spec.int8:
            sums = dot_product(
                rows, blocks, spec.lanes, (self.depth,),
                lambda i, r: (self.data, (row + i, r * 4)), lambda j, r: (self.weight, (block + j, r)), self.vnni,
            )  # fmt: skip
        else:
            sums = product(
                rows, blocks, spec.lanes, (self.depth,),
                lambda i, r: self.data[row + i, r], lambda j, r, lane: self.weight[block + j, r, lane],
            )  # fmt: skip
        lanes = spec.o % spec.lanes if partial else spec.lanes
        with T.serial(0, rows) as i, T.serial(0, blocks) as j, T.vectorized(0, lanes) as lane:
            value = sums[i, j, lane]
            if spec.int8:
                value = T.cast(value + self.correction[block + j, lane], "float32")
            place = (row + i, (block + j) * spec.lanes + lane)
            value = finish(spec.steps, self.extra, value, (block + j, lane), place)
            T.buffer_store(self.out, value, list(place))

    def _quantised(self) -> Any:
        spec = self.spec
        rows = local((spec.m, self.depth * 4), "uint8", "global")
        with T.serial(0, spec.m) as m:
            for start, count, size in parts(spec.k, spec.lanes):
                with T.serial(0, count) as part, T.vectorized(0, size) as lane:
                    k = start + part * size + lane
                    value = self.source[m, k]
                    if spec.quantize is not None:
                        value = quantized(value, *spec.quantize)
                    T.buffer_store(rows, value, [m, k])
            for k in range(spec.k, self.depth * 4):
                T.buffer_store(rows, T.uint8(spec.zero_point), [m, k])
        return rows
