"""Depthwise convolutions of bytes for LLVM CPUs whose products sum four bytes a lane: four neighbouring pixels at once.

The data of a channel are as far apart as a pixel is long: four pixels of all lanes are read as one vector, whose bytes
are put in the order of the channels by one or two instructions. For that the data are framed; what arrives as float32
is quantised on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import ceil
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from .convspec import EXPONENTIAL_STEPS, ConvSpec
from .emit import Registers, argument, copied, cover, dot_step, kernel, loop, view
from .epilogue import epilogue_buffers, finish, store_bytes, stores_bytes
from .frame import Source
from .narrow import TOGETHER, starts

_INTERLEAVED = "planish_interleaved"
# Of the copy of a strip, which is to stay in the first level of cache beside what is written.
_STRIP_BYTES = 24 << 10


def depthwise_bytes(spec: ConvSpec) -> tvm.tirx.PrimFunc:
    """The function of (data, [1 / scale and zero point], weight, correction, one buffer a step, output).

    Args:
        spec: Whose `neighbours` are summed. Weights and correction are those of `packing.weight_neighbours`.
    """
    with kernel() as (emitted, body):
        body(_importing(spec.lanes, _DepthwiseBytes(spec).body))
    return emitted.function


class _DepthwiseBytes:
    def __init__(self, spec: ConvSpec) -> None:
        assert spec.dot is not None
        self.spec, self.dot = spec, spec.dot
        blocks, lanes, depth = spec.out_blocks, spec.lanes, spec.dot.depth
        self.source = Source(spec)
        self.groups = ceil(spec.kernel[1] / depth)
        self.weight = argument("weight", (blocks, spec.kernel[0], self.groups, lanes, depth), "int8")
        self.correction = argument("correction", (blocks, lanes), "int32")
        out_shape = (spec.n, blocks, spec.oh, spec.ow, lanes)
        self.extra = [argument(*item) for item in epilogue_buffers(spec.steps, (blocks, lanes), out_shape)]
        self.out = argument("out", out_shape, spec.out_dtype)
        # Outputs whose sums are in registers at once; rows share the pixels that they read. AVX2 has half as many.
        self.rows = min(2 if lanes == 8 else 4, spec.oh)
        self.columns = min(TOGETHER, spec.ow)

    def body(self) -> None:
        spec = self.spec
        self.source.open()
        together = self.columns == TOGETHER and stores_bytes(spec)
        rows = (spec.n, spec.out_blocks, spec.oh, spec.ow * spec.lanes)
        self.bytes = view(self.out, rows, "uint8") if together else None
        (sh, sw), dh = spec.stride, spec.dilation[0]
        wide = (spec.ow - 1) * sw + self.groups * self.dot.depth
        reach = (spec.kernel[0] - 1) * dh + 1
        room = _STRIP_BYTES // (max(wide, spec.padding[1] + spec.w) * spec.lanes)
        size = min(max((room - reach) // sh + 1, self.rows), spec.oh)
        strips = ceil(spec.oh / size)
        with loop(spec.n * spec.out_blocks * strips, spec.threads) as task:
            place = T.bind(task // strips) if strips > 1 else task
            # The last one begins early enough, as in `cover`.
            first = T.bind(T.min(task % strips * size, spec.oh - size)) if strips > 1 else 0
            n, block = T.bind(place // spec.out_blocks), T.bind(place % spec.out_blocks)
            frame = self.source.frame(1, (size - 1) * sh + reach, wide, blocks=1)
            self.source.copy(frame, 0, n, first if isinstance(first, int) else T.bind(first * sh), 0, 1, block=block)
            with cover(size, self.rows) as (_, y), cover(spec.ow, self.columns) as (_, x):
                self._store(n, block, first + y, x, self._sums(frame, block, y, x))

    def _sums(self, frame: Any, block: Any, y: Any, x: Any) -> Callable[[int, int, Any], Any]:
        """The sums of the tile at (y, x) of a strip, by row, column and lane."""
        spec, lanes, depth = self.spec, self.spec.lanes, self.dot.depth
        (sh, sw), dh = spec.stride, spec.dilation[0]
        sums, lane, bytes_ = Registers((self.rows * self.columns, lanes), "int32"), T.ramp(0, 1, lanes), lanes * depth
        for i in range(self.rows * self.columns):
            sums.store(self.correction[block, lane], i, lane)
        weights = {
            (ky, g): T.bind(self.weight.vload([block, ky, g, 0, 0], f"int8x{bytes_}"))
            for ky, g in product(range(spec.kernel[0]), range(self.groups))
        }
        taps = list(product(range(self.rows), range(spec.kernel[0])))
        for row in range((self.rows - 1) * sh + (spec.kernel[0] - 1) * dh + 1):
            users = [(oy, ky) for oy, ky in taps if oy * sh + ky * dh == row]
            if not users:
                continue
            for column, g in product(range(self.columns), range(self.groups)):
                at = T.bind(((x + column) * sw + g * depth) * lanes)
                pixels = frame.vload([0, 0, y * sh + row, at], f"{self.dot.data}x{bytes_}")
                near = T.bind(T.call_extern(f"{self.dot.data}x{bytes_}", _INTERLEAVED, pixels))
                for oy, ky in users:
                    i = oy * self.columns + column
                    total = sums.vload((i, 0), f"int32x{lanes}")
                    sums.store(dot_step(self.dot, lanes, total, near, weights[ky, g]), i, lane)
        return lambda oy, column, lane: sums[oy * self.columns + column, lane]

    def _store(self, n: Any, block: Any, y: Any, x: Any, sums: Callable[[int, int, Any], Any]) -> None:
        """The epilogue of a tile."""
        spec, lanes = self.spec, self.spec.lanes
        if self.bytes is not None:
            lane = T.ramp(0, 1, lanes)
            for row, start in product(range(self.rows), starts(self.columns)):
                places = [(n, block, y + row, x + start + k, lane) for k in range(TOGETHER)]
                values = [T.cast(sums(row, start + k, lane), f"float32x{lanes}") for k in range(TOGETHER)]
                store_bytes(spec.steps, self.extra, self.bytes, values, (block, lane), places, lanes)
            return

        def store(value: Any, row: Any, column: Any, lane: Any) -> None:
            place = (n, block, y + row, x + column, lane)
            value = finish(spec.steps, self.extra, T.cast(value, "float32"), (block, lane), place)
            T.buffer_store(self.out, value, list(place))

        if any(step.op in EXPONENTIAL_STEPS for step in spec.steps):  # long code once, not for every register
            count = self.rows * self.columns
            found = copied(lambda i, _, lane: sums(i // self.columns, i % self.columns, lane), count, 1, lanes, "int32")
            with T.serial(0, self.rows) as row, T.serial(0, self.columns) as column, T.vectorized(0, lanes) as lane:
                store(found(row * self.columns + column, 0, lane), row, column, lane)
            return
        with T.vectorized(0, lanes) as lane:
            for row, column in product(range(self.rows), range(self.columns)):
                store(sums(row, column, lane), row, column, lane)


def _importing(lanes: int, emit: Callable[[], None]) -> Callable[[], None]:
    """The body of a kernel together with the function that puts the bytes of four pixels in the order of the lanes.

    TVM's own shuffles become one instruction a byte; of this one LLVM makes VPERMB, two shuffles, or TBL.
    """
    count = lanes * 4
    kind = f"<{count} x i8>"
    order = ", ".join(f"i32 {i % 4 * lanes + i // 4}" for i in range(count))
    source = f"""define {kind} @{_INTERLEAVED}({kind} %pixels) {{
  %result = shufflevector {kind} %pixels, {kind} poison, <{count} x i32> <{order}>
  ret {kind} %result
}}
"""

    def with_function() -> None:
        with T.attr(T.int32(0), "pragma_import_llvm", source):
            emit()

    return with_function
