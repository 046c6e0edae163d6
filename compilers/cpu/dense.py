"""Fully connected layers for LLVM CPUs: (m, k) times weights packed as (O/lanes, k, lanes)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from ...spaces.bit_widths import LEVELS
from .convspec import Step, data_type, result_type, weight_type
from .emit import argument, copied, dot_product, importing, kernel, local, loop, parts, product
from .epilogue import epilogue_buffers, finish, quantized_steps
from .functions import bfloat16
from .machine import Dot, Machine
from .narrow import TOGETHER, bytes_of, narrows
from .tiles import row_tile


@dataclass(frozen=True)
class DenseSpec:
    """y[m, o] = steps(sum_k x[m, k] w[o, k]); `quantize` as in `ConvSpec`, and the result is float32, uint8 or uint16.

    Tensors of the steps `add` and `mul` are (m, o). With `nibbles` two weights of 4 bits are in a byte of memory.
    `weight_bits` are those of the weights that float32 data are multiplied with: 32, 8, or 4, of which eight are in an
    int32 and k a multiple of eight.
    """

    m: int
    k: int
    o: int
    lanes: int = 16
    dot: Dot | None = None
    quantize: bool = False
    steps: tuple[Step, ...] = ()
    threads: int = 1
    nibbles: bool = False
    weight_bits: int = 32

    @property
    def int8(self) -> bool:
        """Whether it sums integers."""
        return self.dot is not None and not self.dot.floats

    @property
    def bits(self) -> int:
        """Of the numbers that it multiplies."""
        return 8 if self.int8 else 16 if self.dot else 32

    @property
    def corrected(self) -> bool:
        """Whether the zero point is taken from the sums, by an argument of their features, and not from the data."""
        return self.dot is not None and self.int8 and self.dot.data != "int16"

    @property
    def step(self) -> int:
        """Inputs that one turn of the innermost loop sums."""
        if self.weight_bits == 4:
            return 8
        return (self.dot.depth if self.dot else 1) * (2 if self.nibbles else 1)

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
        """See `result_type`."""
        return result_type(self.steps)


def dense(spec: DenseSpec, machine: Machine) -> tvm.tirx.PrimFunc:
    """The function of (data, [1 / scale and zero point], weight, [correction], one buffer a step, output)."""
    with kernel() as (emitted, body):
        body(importing(spec.dot, spec.lanes, _Dense(spec, machine).body))
    return emitted.function


def nibbles_pay(spec: DenseSpec, largest: int, machine: Machine) -> bool:
    """Whether two weights in a byte are faster for bytes: unpacking takes instructions, waiting for memory longer.

    Measured on AVX2, of 4-bit weights beside the same ones in bytes: of one row of inputs 1.3 to 1.9 times as fast
    where the second level of cache does not hold the bytes, of four rows 1.15 to 1.3 times where the third does not;
    elsewhere 0.84 to 1.1 times.

    Args:
        spec: With whole bytes.
        largest: The largest magnitude of a weight.
        machine: The CPU.
    """
    if spec.dot is None or spec.dot.data == "int16" or largest > LEVELS[4]:
        return False
    weights = spec.k * spec.o
    return (spec.m == 1 and weights > machine.caches[1]) or (spec.m <= 4 and weights > machine.caches[2])


class _Dense:
    def __init__(self, spec: DenseSpec, machine: Machine) -> None:
        self.spec = spec
        lanes, blocks, dot = spec.lanes, spec.out_blocks, spec.dot
        self.source = argument("data", (spec.m, spec.k), data_type(dot, spec.quantize))
        self.numbers = argument("input", (2,)) if spec.int8 else None
        self.depth = ceil(spec.k / spec.step)
        inner = (lanes, dot.depth) if dot else (lanes,)
        kind = {32: "float32", 8: "int8", 4: "int32"}[spec.weight_bits]
        if dot:
            kind = "uint8" if spec.nibbles else weight_type(dot)
        self.weight = argument("weight", (blocks, self.depth, *inner), kind)
        self.correction = argument("correction", (blocks, lanes), "int32") if spec.corrected else None
        shapes = epilogue_buffers(spec.steps, (blocks, lanes), (spec.m, spec.o))
        self.extra = [argument(name, shape) for name, shape in shapes]
        self.out = argument("out", (spec.m, spec.o), spec.out_dtype)
        # The last block is a piece of its own where only some of its lanes exist.
        self.whole = spec.o // lanes
        self.rows, self.blocks = row_tile(spec.m, self.whole or 1, replace(machine, threads=spec.threads), dot)

    def body(self) -> None:
        spec, dot = self.spec, self.spec.dot
        copy = dot and (spec.quantize or spec.k % spec.step or dot.data not in ("uint8", "uint16"))
        self.data = self._copied() if copy else self.source
        rows, tiles = self.rows, ceil(spec.m / self.rows)
        # The last block alone where only some of its lanes exist.
        panels = [(0, self.whole, self.blocks)] if self.whole else []
        panels += [(self.whole, 1, 1)] if spec.o % spec.lanes else []
        for start, extent, blocks in panels:
            with loop(tiles * ceil(extent / blocks), spec.threads) as place:
                # Rows are the inner loop: a panel of weights is read once and stays near. The last tile of rows, and
                # the last panel, begin early enough, as in `cover`.
                row = T.bind(T.min(place % tiles * rows, spec.m - rows))
                block = T.bind(start + T.min(place // tiles * blocks, extent - blocks))
                self._tile(row, rows, block, blocks, start == self.whole)

    def _tile(self, row: Any, rows: int, block: Any, blocks: int, partial: bool) -> None:
        spec, dot = self.spec, self.spec.dot
        if dot:
            sums = dot_product(
                rows, blocks, spec.lanes, (self.depth,),
                lambda i, r: (self.data, (row + i, r * spec.step)), lambda j, r: (self.weight, (block + j, r)), dot,
                nibbles=spec.nibbles,
            )  # fmt: skip
        else:
            sums = product(
                rows, blocks, spec.lanes, (self.depth,),
                lambda i, r, part: self.data[row + i, r * spec.step + part],
                lambda j, r, part, lane: self._float(self.weight[block + j, r, lane], part), parts=spec.step,
            )  # fmt: skip
        sums = copied(sums, rows, blocks, spec.lanes, dot.sums_type if dot else "float32")
        lanes = spec.o % spec.lanes if partial else spec.lanes
        with T.serial(0, rows) as i, T.serial(0, blocks) as j, T.vectorized(0, lanes) as lane:
            value = sums(i, j, lane)
            if self.correction is not None:
                value = value + self.correction[block + j, lane]
            if spec.int8:
                value = T.cast(value, "float32")
            place = (row + i, (block + j) * spec.lanes + lane)
            value = finish(spec.steps, self.extra, value, (block + j, lane), place)
            T.buffer_store(self.out, value, list(place))

    def _float(self, weight: Any, part: int) -> Any:
        """The weights of one input, of which several may be in a number, as float32."""
        if self.spec.weight_bits == 32:
            return weight
        if self.spec.weight_bits == 4:  # to the top, and back with its sign
            weight = T.shift_right(T.shift_left(weight, T.int32(28 - 4 * part)), T.int32(28))
        return T.cast(weight, "float32")

    def _copied(self) -> Any:
        """The data as the products take them: quantised, widened, filled up to whole steps."""
        spec, dot = self.spec, self.spec.dot
        assert dot is not None
        if self.numbers is None:
            return self._copied_halves()
        factor, zero = T.bind(self.numbers[0]), T.bind(self.numbers[1])
        whole = T.bind(T.cast(zero, "int32"))
        shift = {"uint8": T.int32(0), "int8": T.int32(128)}.get(dot.data, whole)
        rows = local((spec.m, self.depth * spec.step), dot.data)
        with loop(spec.m, spec.threads) as m:
            whole_lanes = TOGETHER * spec.lanes
            done = 0
            if spec.quantize and dot.data == "uint8" and narrows(dot, spec.lanes):
                done = spec.k // whole_lanes * whole_lanes
                with T.serial(0, done // whole_lanes) as part:
                    at = [T.ramp((part * TOGETHER + k) * spec.lanes, 1, spec.lanes) for k in range(TOGETHER)]
                    values = [self.source[m, place] * factor for place in at]
                    stored = bytes_of(values, zero, spec.lanes)
                    T.buffer_store(rows, stored, [m, T.ramp(part * whole_lanes, 1, whole_lanes)])
            for start, count, size in parts(spec.k - done, spec.lanes, done):
                with T.serial(0, count) as part, T.vectorized(0, size) as lane:
                    k = start + part * size + lane
                    value = self.source[m, k]
                    if spec.quantize:
                        value = quantized_steps(value * factor, zero) + (whole - shift)
                    elif dot.data != "uint8":
                        value = T.cast(value, "int16") - T.cast(shift, "int16")
                    T.buffer_store(rows, T.cast(value, dot.data), [m, k])
            for k in range(spec.k, self.depth * spec.step):
                T.buffer_store(rows, T.cast(whole - shift, dot.data), [m, k])
        return rows

    def _copied_halves(self) -> Any:
        """The data as bfloat16, filled up to whole steps."""
        spec = self.spec
        rows = local((spec.m, self.depth * spec.step), "uint16")
        with loop(spec.m, spec.threads) as m:
            for start, count, size in parts(spec.k, spec.lanes):
                with T.serial(0, count) as part, T.vectorized(0, size) as lane:
                    k = start + part * size + lane
                    value = self.source[m, k]
                    T.buffer_store(rows, bfloat16(value) if spec.quantize else value, [m, k])
            for k in range(spec.k, self.depth * spec.step):
                T.buffer_store(rows, T.uint16(0), [m, k])
        return rows
