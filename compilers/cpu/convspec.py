"""What one fused convolution computes: shapes, layout, epilogue. No TVM here, so tests and models can use it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from .machine import Dot


@dataclass(frozen=True)
class Step:
    """One elementwise step of an epilogue, applied to the accumulated value.

    `op` is one of: `scale`, `bias` (per-channel factor, offset: one buffer of shape (blocks, lanes)), `add`,
    `mul` (with a tensor of the output's shape and layout), `relu`, `clip` (values: low, high), `sigmoid`, `silu`,
    `gelu`, `erf`, `hardswish`, `hardsigmoid`, `tanh`, `quantize` (one buffer of 1 / scale and zero point; the result is
    uint8; see `DIVIDED`), `bfloat16` (the result is uint16, the bits of bfloat16). What differs between layers of one
    shape is in buffers, so that they share one kernel.
    """

    op: str
    values: tuple[float, ...] = ()


# Of what has been divided by the scale already: of the buffer only the zero point counts.
DIVIDED = Step("quantize", (1.0,))


# Of these one kernel takes one: LLVM's code generator expands what is nested, and three take it a minute.
EXPONENTIAL_STEPS = frozenset({"sigmoid", "silu", "tanh", "gelu", "erf", "exp"})
BUFFER_STEPS = ("scale", "bias", "add", "mul", "quantize")


def data_type(dot: Dot | None, converted: bool) -> str:
    """The type of a kernel's data, which float32 data that it converts itself are not yet."""
    if dot is None or converted:
        return "float32"
    return "uint16" if dot.floats else "uint8"


def weight_type(dot: Dot | None) -> str:
    """The type of a kernel's weights."""
    if dot is None:
        return "float32"
    return "uint16" if dot.floats else "int8"


def result_type(steps: tuple[Step, ...]) -> str:
    """The type of a kernel's result: float32 unless a step makes something else of it."""
    return next((_CONVERSIONS[step.op] for step in steps if step.op in _CONVERSIONS), "float32")


_CONVERSIONS = {"quantize": "uint8", "bfloat16": "uint16"}


@dataclass(frozen=True)
class ConvSpec:
    """A two-dimensional convolution on blocked tensors.

    Data have the shape (n, blocks, h, w, lanes). Where `in_lanes` differs from `lanes` they are plain NCHW: 1 for
    float32, and for int8 the inputs that one step of `dot` sums, or 1 where it sums pixels of a row (`in_rows`). The
    result has the shape (n, blocks, oh, ow, lanes).
    `groups` divides both channel counts into whole blocks, except for a depthwise convolution (`depthwise`), whose
    filters are (blocks, kh, kw, lanes).

    Data are float32, or for a convolution that has a `dot` uint8 or, of bfloat16, uint16; `quantize` says that they
    arrive as float32 and are converted where they are copied. An int8 kernel reads 1 / scale and zero point of its data
    from a buffer.
    """

    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    lanes: int = 16
    in_lanes: int = 16
    depthwise: bool = False
    dot: Dot | None = None
    quantize: bool = False
    steps: tuple[Step, ...] = ()
    threads: int = 1

    @property
    def int8(self) -> bool:
        """Whether it sums integers."""
        return self.dot is not None and not self.dot.floats

    @property
    def bits(self) -> int:
        """Of the numbers that it multiplies."""
        return 8 if self.int8 else 16 if self.dot else 32

    @property
    def weight_bytes(self) -> int:
        """Of a weight as the direct form reads it."""
        return self.dot.weight_bytes if self.dot else 4

    @property
    def corrected(self) -> bool:
        """Whether the zero point is taken from the sums, by an argument of their channels, and not from the data."""
        found = self.dot is not None and self.int8 and self.dot.data != "int16"
        return found and (self.neighbours or not self.depthwise)

    @property
    def neighbours(self) -> bool:
        """Whether it is depthwise and one step of `dot` sums neighbouring pixels (see `depthwise_bytes`)."""
        dot = self.dot
        return self.depthwise and dot is not None and dot.name in ("vnni", "sdot") and self.dilation[1] == 1

    @property
    def flat(self) -> bool:
        """Whether it is a matrix product over all pixels of an image."""
        alone = (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0, 0, 0))
        return alone and self.in_lanes == self.lanes and not self.depthwise

    @property
    def oh(self) -> int:
        """Rows of the output."""
        framed, reach = self.h + self.padding[0] + self.padding[2], self.dilation[0] * (self.kernel[0] - 1) + 1
        return (framed - reach) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        """Columns of the output."""
        framed, reach = self.w + self.padding[1] + self.padding[3], self.dilation[1] * (self.kernel[1] - 1) + 1
        return (framed - reach) // self.stride[1] + 1

    @property
    def in_rows(self) -> bool:
        """Whether one step of `dot` sums neighbouring pixels of one channel and not channels of one pixel."""
        return self.dot is not None and self.in_lanes == 1 and self.dot.depth > 1 and not self.depthwise

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the kernel as they are stepped through: `in_rows` several columns at once."""
        if self.dot is None or not self.in_rows:
            return self.kernel
        return self.kernel[0], ceil(self.kernel[1] / self.dot.depth)

    @property
    def in_blocks(self) -> int:
        """Blocks of input channels, of all groups."""
        return ceil(self.c / self.in_lanes)

    @property
    def reduce_lanes(self) -> int:
        """Input lanes that are summed: a single block with few channels is not read to its end."""
        if self.dot is not None and self.in_rows:
            return self.dot.depth
        if self.in_blocks > 1 or self.c >= self.in_lanes:
            return self.in_lanes
        return ceil(self.c / self.dot.depth) * self.dot.depth if self.dot else self.c

    @property
    def out_blocks(self) -> int:
        """Blocks of output channels."""
        return ceil(self.o / self.lanes)

    @property
    def group_blocks(self) -> int:
        """Blocks of input channels that one output channel reads."""
        return self.in_blocks // self.groups

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolution itself, without the padding of the blocks."""
        per_output = self.kernel[0] * self.kernel[1] * (1 if self.depthwise else self.c // self.groups)
        return self.n * self.o * self.oh * self.ow * per_output

    @property
    def out_dtype(self) -> str:
        """See `result_type`."""
        return result_type(self.steps)
