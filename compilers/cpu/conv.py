"""Convolutions on blocked tensors for LLVM CPUs: the fused computation and its schedule.

Data are (n, C/lanes, h, w, lanes) and weights (O/lanes, C/lanes, kh, kw, lanes in, lanes out): one vector of output
channels is accumulated in registers for a tile of pixels over the whole reduction, and the epilogue (bias, residual,
activation, requantisation) runs while the tile is still there. Nothing is tuned: see `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import te
from tvm.s_tir import Schedule

from . import functions
from .convspec import BUFFER_STEPS, ConvSpec, Step
from .functions import const
from .intrinsics import VNNI_DOT
from .tiles import Tile


def convolution(spec: ConvSpec, tile: Tile, *, vnni: bool = False) -> tvm.tirx.PrimFunc:
    """The scheduled function; its arguments are data, weight, [zero-point correction], one buffer a step, output.

    Args:
        spec: Shapes, layout and epilogue.
        tile: Register tile; `spec.ow` need not be a multiple.
        vnni: The target has AVX-512 VNNI, and `spec.int8` may use it.
    """
    function = te.create_prim_func(_compute(spec, tile)).with_attr("tirx.noalias", True)
    return _schedule(spec, tile, function, vnni)


def epilogue_buffers(
    steps: Sequence[Step], lanes_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the buffer of each step that needs one."""
    return [
        (f"{step.op}{number}", lanes_shape if step.op in ("scale", "bias") else out_shape)
        for number, step in enumerate(steps)
        if step.op in BUFFER_STEPS
    ]


def finish(
    steps: Sequence[Step], buffers: Sequence[Any], value: Any, channel: tuple[Any, ...], place: tuple[Any, ...]
) -> Any:
    """The value after all steps; `buffers` are those of `epilogue_buffers`, read at `channel` or `place`."""
    remaining = iter(buffers)
    for step in steps:
        if step.op == "scale":
            value = value * next(remaining)[channel]
        elif step.op == "bias":
            value = value + next(remaining)[channel]
        elif step.op == "add":
            value = value + next(remaining)[place]
        elif step.op == "mul":
            value = value * next(remaining)[place]
        else:
            value = activation(step, value)
    return value


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    name: getattr(functions, name)
    for name in ("sigmoid", "silu", "tanh", "gelu", "hardsigmoid", "hardswish", "exp", "erf")
}


def activation(step: Step, value: Any) -> Any:
    """The elementwise steps that need no buffer."""
    if step.op == "relu":
        return te.max(value, const(0))
    if step.op == "clip":
        return te.min(te.max(value, const(step.values[0])), const(step.values[1]))
    if step.op == "quantize":
        return quantized(value, step.values[0], int(step.values[1]))
    if step.op not in _FUNCTIONS:
        raise ValueError(f"step {step.op!r} is not known to the CPU kernels")
    return _FUNCTIONS[step.op](value)


def quantized(value: Any, scale: float, zero_point: int) -> Any:
    """clamp(round(value * (1 / scale)) + zero point, 0, 255) as uint8; rounds half to even (see `spaces.integer`).

    The clamp comes first: its bounds are whole numbers, so that rounding does not cross them.
    """
    factor = float(np.float32(1) / np.float32(scale))
    bounded = te.min(te.max(value * const(factor), const(-zero_point)), const(255 - zero_point))
    # Through int32: LLVM narrows a whole vector of int32 in one instruction.
    return (functions.whole(bounded) + tvm.tirx.const(zero_point, "int32")).astype("uint8")


def _compute(spec: ConvSpec, tile: Tile) -> list[te.Tensor]:
    (kh, kw), (sh, sw), (dh, dw) = spec.kernel, spec.stride, spec.dilation
    columns = -(-spec.ow // tile.ow) * tile.ow
    rows = -(-spec.oh // tile.oh) * tile.oh
    source = te.placeholder(_data_shape(spec), name="data", dtype=_data_dtype(spec))
    data = _padded(spec, source, (rows - 1) * sh + (kh - 1) * dh + 1, (columns - 1) * sw + (kw - 1) * dw + 1)
    shape = (spec.n, spec.out_blocks, rows, columns, spec.lanes)
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    group = spec.out_blocks if spec.depthwise else spec.out_blocks // spec.groups
    lanes_shape, out_shape = (spec.out_blocks, spec.lanes), (spec.n, spec.out_blocks, spec.oh, spec.ow, spec.lanes)
    extra: list[te.Tensor] = []
    if spec.depthwise:
        weight = te.placeholder((spec.out_blocks, kh, kw, spec.lanes), name="weight")
        zero = tvm.tirx.const(spec.zero_point if spec.int8 else 0, "float32")

        def term(n: Any, b: Any, y: Any, x: Any, o: Any) -> Any:
            value = data[n, b, y * sh + ky * dh, x * sw + kx * dw, o]
            if spec.int8:  # exact in float32: at most kh * kw * 255 * 127 < 2**24
                value = value.astype("int32").astype("float32") - zero
            return te.sum(value * weight[b, ky, kx, o], axis=[ky, kx])

        total = te.compute(shape, term, name="conv")
    elif spec.int8:
        rb = te.reduce_axis((0, spec.group_blocks), "rb")
        quads = spec.reduce_lanes // 4
        ri, rj = te.reduce_axis((0, quads), "ri"), te.reduce_axis((0, 4), "rj")
        weight = te.placeholder(
            (spec.out_blocks, spec.group_blocks, kh, kw, quads, spec.lanes, 4), name="weight", dtype="int8"
        )
        correction = te.placeholder(lanes_shape, name="correction", dtype="int32")
        extra.append(correction)
        total = te.compute(
            shape,
            lambda n, b, y, x, o: te.sum(
                data[n, b // group * spec.group_blocks + rb, y * sh + ky * dh, x * sw + kx * dw, ri * 4 + rj].astype(
                    "int32"
                )
                * weight[b, rb, ky, kx, ri, o, rj].astype("int32"),
                axis=[rb, ky, kx, ri, rj],
            ),
            name="conv",
        )
    else:
        rb, ri = te.reduce_axis((0, spec.group_blocks), "rb"), te.reduce_axis((0, spec.reduce_lanes), "ri")
        weight = te.placeholder(
            (spec.out_blocks, spec.group_blocks, kh, kw, spec.reduce_lanes, spec.lanes), name="weight"
        )
        total = te.compute(
            shape,
            lambda n, b, y, x, o: te.sum(
                data[n, b // group * spec.group_blocks + rb, y * sh + ky * dh, x * sw + kx * dw, ri]
                * weight[b, rb, ky, kx, ri, o],
                axis=[rb, ky, kx, ri],
            ),
            name="conv",
        )
    shapes = epilogue_buffers(spec.steps, lanes_shape, out_shape)
    buffers = [te.placeholder(shape, name=name) for name, shape in shapes]

    def last(n: Any, b: Any, y: Any, x: Any, o: Any) -> Any:
        value = total[n, b, y, x, o]
        if extra:
            value = (value + extra[0][b, o]).astype("float32")
        return finish(spec.steps, buffers, value, (b, o), (n, b, y, x, o))

    out = te.compute(out_shape, last, name="out")
    return [source, weight, *extra, *buffers, out]


def _data_shape(spec: ConvSpec) -> tuple[int, ...]:
    if spec.in_lanes == spec.lanes:
        return (spec.n, spec.in_blocks, spec.h, spec.w, spec.lanes)
    return (spec.n, spec.c, spec.h, spec.w)  # plain: the first layer's few channels


def _data_dtype(spec: ConvSpec) -> str:
    return "uint8" if spec.int8 and spec.quantize is None else "float32"


def _padded(spec: ConvSpec, source: te.Tensor, rows: int, columns: int) -> te.Tensor:
    """The data with a frame of zero points, at least rows x columns large, quantised on the way if asked for."""
    tile_shape = (max(rows, spec.h + spec.padding[0]), max(columns, spec.w + spec.padding[1]))
    plain = spec.in_lanes != spec.lanes
    frame_needed = any(spec.padding) or rows > spec.h or columns > spec.w
    if not (frame_needed or plain or spec.quantize is not None):
        return source
    top, left = spec.padding[0], spec.padding[1]
    zero = tvm.tirx.const(spec.zero_point if spec.int8 else 0, "uint8" if spec.int8 else "float32")

    def value(n: Any, b: Any, y: Any, x: Any, i: Any) -> Any:
        channel = b * spec.in_lanes + i
        inside = source[n, channel, y - top, x - left] if plain else source[n, b, y - top, x - left, i]
        if spec.quantize is not None:
            inside = quantized(inside, spec.quantize[0], spec.quantize[1])
        conditions = []
        if top or tile_shape[0] > spec.h:
            conditions += [y >= top, y < spec.h + top]
        if left or tile_shape[1] > spec.w:
            conditions += [x >= left, x < spec.w + left]
        if plain and spec.in_blocks * spec.in_lanes > spec.c:
            conditions.append(channel < spec.c)
        return te.if_then_else(te.all(*conditions), inside, zero) if conditions else inside

    return te.compute((spec.n, spec.in_blocks, *tile_shape, spec.in_lanes), value, name="pad")


def _schedule(spec: ConvSpec, tile: Tile, function: tvm.tirx.PrimFunc, vnni: bool) -> tvm.tirx.PrimFunc:
    """Keeps the tile's accumulators in registers over the whole reduction."""
    s = Schedule(tvm.IRModule({"main": function}))
    conv, out = s.get_sblock("conv"), s.get_sblock("out")
    n, block, y, x, lane, *reduction = s.get_loops(conv)
    block_outer, block_inner = s.split(block, [None, tile.blocks])
    y_outer, y_inner = s.split(y, [None, tile.oh])
    x_outer, x_inner = s.split(x, [None, tile.ow])
    use_vnni = spec.int8 and vnni and not spec.depthwise
    if not use_vnni:  # the intrinsic's description matches buffers of the global scope only
        s.set_scope(conv, 0, "local")
    # For int8 the last reduction axis (four bytes) belongs to the instruction, inside the lanes.
    outer, inner = (reduction[:-1], reduction[-1:]) if spec.int8 and not spec.depthwise else (reduction, [])
    s.reorder(n, block_outer, y_outer, x_outer, *outer, y_inner, x_inner, block_inner, lane, *inner)
    s.reverse_compute_at(out, x_outer, preserve_unit_loops=True)
    for loop in (y_inner, x_inner, block_inner):
        s.unroll(loop)
    # Before decomposing: afterwards the update is no reduction block any more, and refuses both.
    main = s.fuse(n, block_outer, y_outer)
    if spec.threads > 1:
        s.parallel(main)
    if not use_vnni:
        for loop in inner:
            s.unroll(loop)
        s.vectorize(lane)
    init = s.decompose_reduction(conv, outer[0])
    if use_vnni:
        s.tensorize(lane, VNNI_DOT)
    *init_rows, init_lane = s.get_loops(init)[-4:]
    for loop in init_rows:
        s.unroll(loop)
    if use_vnni:
        s.vectorize(init_lane)
    *out_rows, out_lane = s.get_loops(out)[-4:]
    for loop in out_rows:
        s.unroll(loop)
    s.vectorize(out_lane)
    _schedule_pad(s, spec)
    return s.mod["main"]


def _schedule_pad(s: Schedule, spec: ConvSpec) -> None:
    names = [s.get(block).name_hint for block in s.get_child_blocks(s.get_sblock("root"))]
    if "pad" not in names:
        return
    loops = s.get_loops(s.get_sblock("pad"))
    # Blocked data are copied a vector of channels at a time; plain data have their pixels side by side.
    if spec.in_lanes == spec.lanes:
        s.vectorize(loops[-1])
    rows = s.fuse(*loops[:3])
    if spec.threads > 1:
        s.parallel(rows)
