"""The data of a convolution, and the copy of them that is framed with zeros, quantised or widened for its products."""

from __future__ import annotations

from math import ceil
from typing import Any

from tvm.tirx.script import builder as T

from .convspec import ConvSpec, data_type
from .emit import argument, local, loop, parts, view, when
from .epilogue import quantized_steps
from .functions import bfloat16
from .narrow import TOGETHER, bytes_of, narrows

# Elements that are copied at once: what is copied needs few instructions, and whole rows are one after the other.
_WIDE = 32


class Source:
    """The argument `data` of a kernel.

    Attributes:
        data: As the direct form reads it where `framed` is false: (n, blocks, rows, columns * lanes), pixels in one row
            where the convolution is flat.
        framed: The products cannot read the data as they are, but only a copy.
        picked: The copy holds only the pixels that are read, side by side.
    """

    def __init__(self, spec: ConvSpec) -> None:
        self.spec, dot = spec, spec.dot
        self.h, self.w = (1, spec.h * spec.w) if spec.flat else (spec.h, spec.w)
        self.plain = spec.in_lanes != spec.lanes
        dtype = data_type(dot, spec.quantize)
        if self.plain:
            self.data = argument("data", (spec.n, spec.c, spec.h, spec.w), dtype)
        else:
            self._whole = argument("data", (spec.n, spec.in_blocks, spec.h, spec.w, spec.lanes), dtype)
        self.dtype = dot.data if dot else "float32"
        self.framed = self.plain or any(spec.padding) or self.dtype != dtype
        # Of what a 1x1 convolution with a stride leaves out nothing need be copied.
        self.picked = self.framed and not self.plain and spec.kernel == (1, 1) and spec.stride != (1, 1)
        self.picked = self.picked and not any(spec.padding) and not spec.depthwise
        self.numbers = argument("input", (2,)) if spec.int8 else None

    def open(self) -> None:
        """Call it once, inside the body."""
        spec = self.spec
        if self.numbers is not None:
            self.factor, self.zero = T.bind(self.numbers[0]), T.bind(self.numbers[1])
            whole = T.cast(self.zero, "int32")
            # What is subtracted from a stored byte, and what a byte of the zero point then is.
            offset, edge = {"uint8": (T.int32(0), whole), "int8": (T.int32(128), whole - 128)}.get(
                self.dtype, (whole, T.int32(0))
            )
            self.offset, self.edge = T.bind(offset), T.bind(edge)
        if not self.plain:
            self.data = view(self._whole, (spec.n, spec.in_blocks, self.h, self.w * spec.lanes), self._whole.dtype)

    def frame(self, images: int, rows: int, columns: int, blocks: int = 0) -> Any:
        """Room for a copy: (images, blocks, rows, columns * lanes); wider where the data are and all is copied.

        0 stands for all blocks.
        """
        spec = self.spec
        if not (spec.flat or self.picked):
            columns = max(columns, spec.padding[1] + self.w)
        return local((images, blocks or spec.in_blocks, rows, columns * spec.in_lanes), self.dtype)

    def copy(self, frame: Any, image: Any, n: Any, y: Any, x: Any, threads: int, block: Any = 0) -> None:
        """Fills one image of a frame from image n of the data; the frame's first row is row y of the framed data.

        `x` is the first column, of a flat convolution only; `block` is the block of the data that the first of the
        frame holds.
        """
        spec, lanes = self.spec, self.spec.in_lanes
        top, left = spec.padding[:2]
        _, blocks, high, length = (int(size) for size in frame.shape)
        wide = length // lanes
        inside = min(wide, self.w) if spec.flat else self.w

        def edge(b: Any, r: Any, start: int, count: int) -> None:
            value = T.cast(self.edge, self.dtype) if spec.int8 else T.cast(T.float32(0), self.dtype)
            for begin, times, size in parts(count * lanes, _WIDE, start * lanes):
                with T.serial(0, times) as part:
                    first = begin + part * size
                    whole = (T.broadcast(value, size), T.ramp(first, 1, size)) if size > 1 else (value, first)
                    T.buffer_store(frame, whole[0], [image, b, r, whole[1]])

        with loop(blocks * high, threads) as task:
            b, r = T.bind(task // high), T.bind(task % high)
            row = T.bind(y - top + r)

            def copy() -> None:
                edge(b, r, 0, left)
                if self.plain:
                    self._copy_plain(frame, image, n, b, r, row)
                else:
                    self._copy_blocked(frame, image, n, b, block + b, r, row, x, inside)
                edge(b, r, left + inside, wide - left - inside)

            bottom = isinstance(y, int) and y + high - top <= self.h
            conditions = ([row >= 0] if top else []) + ([] if bottom else [row < self.h])
            when(conditions, copy, lambda: edge(b, r, 0, wide))

    def pick(self, frame: Any, n: Any, y: Any, threads: int) -> None:
        """Fills a frame with the pixels that a 1x1 convolution without padding reads, from its output row y on."""
        spec, lanes = self.spec, self.spec.lanes
        _, blocks, high, _ = (int(size) for size in frame.shape)
        with loop(blocks * high, threads) as task:
            b, r = T.bind(task // high), T.bind(task % high)
            with T.serial(0, spec.ow) as x, T.vectorized(0, lanes) as lane:
                near = self.data[n, b, (y + r) * spec.stride[0], x * (spec.stride[1] * lanes) + lane]
                value = T.cast(self._element(near, "int16"), self.dtype)
                T.buffer_store(frame, value, [0, b, r, x * lanes + lane])

    def _copy_blocked(
        self, frame: Any, image: Any, n: Any, b: Any, block: Any, r: Any, row: Any, x: Any, inside: int
    ) -> None:
        spec, lanes = self.spec, self.spec.lanes
        left = spec.padding[1] * lanes
        if spec.quantize and self.dtype == "uint8" and inside >= TOGETHER and narrows(spec.dot, lanes):
            with T.serial(0, ceil(inside / TOGETHER)) as part:
                # The last ones begin early enough, as in `emit.cover`.
                first = T.bind(T.min(part * TOGETHER, inside - TOGETHER) * lanes)
                at = [first + k * lanes for k in range(TOGETHER)]
                near = [self.data[n, block, row, T.ramp(x * lanes + start, 1, lanes)] * self.factor for start in at]
                whole = T.ramp(left + first, 1, TOGETHER * lanes)
                T.buffer_store(frame, bytes_of(near, self.zero, lanes), [image, b, r, whole])
            return
        for begin, times, size in parts(inside * lanes, lanes if spec.quantize else _WIDE):
            with T.serial(0, times) as part, T.vectorized(0, size) as i:
                at = begin + part * size + i
                value = self._element(self.data[n, block, row, x * lanes + at], "int16")
                T.buffer_store(frame, T.cast(value, self.dtype), [image, b, r, left + at])

    def _copy_plain(self, frame: Any, image: Any, n: Any, b: Any, r: Any, row: Any) -> None:
        """Channels side by side: `in_lanes` of them, as one whole number of 32 bits where there are several."""
        spec, lanes = self.spec, self.spec.in_lanes
        target = frame if lanes == 1 else view(frame, (*frame.shape[:3], frame.shape[3] // lanes), "int32")
        bits = 32 // lanes
        for begin, times, size in parts(spec.w, spec.lanes):
            with T.serial(0, times) as part, T.vectorized(0, size) as i:
                at = begin + part * size + i
                values = []
                for lane in range(lanes):
                    # Weights of channels beyond the last are zero: what stands there does not count.
                    channel = T.min(b * lanes + lane, spec.c - 1) if spec.c % lanes else b * lanes + lane
                    values.append(self._element(self.data[n, channel, row, at], "int32"))
                if lanes == 1:
                    value = T.cast(values[0], self.dtype)
                else:
                    value = T.int32(0)
                    for lane, one in enumerate(values):
                        kept = T.bitwise_and(one, T.int32((1 << bits) - 1)) if lane < lanes - 1 else one
                        value = T.bitwise_or(value, T.shift_left(kept, T.int32(bits * lane)))
                T.buffer_store(target, value, [image, b, r, spec.padding[1] + at])

    def _element(self, value: Any, kind: str) -> Any:
        """One input as the products take it: float32, or a whole number of at least 16 bits."""
        spec = self.spec
        if spec.dot is not None and spec.dot.floats:
            return T.cast(bfloat16(value) if spec.quantize else value, "uint16" if kind == "int16" else kind)
        if spec.quantize:
            steps = quantized_steps(value * self.factor, self.zero)
            return steps if self.dtype == "int16" else steps + self.edge
        if not spec.int8 or (self.dtype == "uint8" and kind == "int16"):
            return value
        return T.cast(value, kind) - T.cast(self.offset, kind)
