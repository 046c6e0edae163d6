"""What the kernels that are written loop by loop have in common: arguments, buffers, tails, register tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T


class Emitted:
    """The function that `kernel` builds, once its block has ended."""

    function: tvm.tirx.PrimFunc


@contextmanager
def kernel() -> Iterator[tuple[Emitted, Callable[[Callable[[], None]], None]]]:
    """A function without schedule: declare its arguments, then hand its body to the second value."""
    emitted = Emitted()
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})

        def body(emit: Callable[[], None]) -> None:
            with T.sblock("root"):
                T.reads([])
                T.writes([])
                emit()

        yield emitted, body
    emitted.function = builder.get()


def argument(name: str, shape: Sequence[int], dtype: str = "float32") -> Any:
    """A buffer that the caller passes."""
    return T.arg(name, T.buffer(tuple(shape), dtype, layout=None, buffer_name=name))


def local(shape: Sequence[int], dtype: str = "float32", scope: str = "local") -> Any:
    """A buffer of the function's own: on the stack, in registers where every index is a number; or `global`."""
    return T.alloc_buffer(tuple(shape), dtype, scope=scope, layout=None, align=64)


def loop(extent: int, threads: int = 1) -> Any:
    """A loop, shared by the threads where there are several."""
    return T.parallel(0, extent) if threads > 1 and extent > 1 else T.serial(0, extent)


def when(conditions: Sequence[Any], emit: Callable[[], None]) -> None:
    """Emits what happens where all conditions hold."""
    if not conditions:
        emit()
        return
    condition = conditions[0]
    for other in conditions[1:]:
        condition = T.And(condition, other)
    with T.If(condition), T.Then():
        emit()


def parts(extent: int, size: int, start: int = 0) -> list[tuple[int, int, int]]:
    """(start, count, size): the whole pieces of an extent, and what is left of it as one smaller piece."""
    whole, rest = divmod(extent, size)
    found = [(start, whole, size)] if whole else []
    return [*found, (start + whole * size, 1, rest)] if rest else found


def product(
    rows: int,
    blocks: int,
    lanes: int,
    depth: Sequence[int],
    left: Callable[..., Any],
    right: Callable[..., Any],
) -> Any:
    """Sums of left(i, *r) * right(j, *r, lane) over the indices r of `depth`, in registers: (rows, blocks, lanes).

    The result is a buffer that any index may read: the registers are copied to it when the sums are complete.
    """
    sums = local((rows, blocks, lanes))
    tile = [(i, j) for i in range(rows) for j in range(blocks)]
    with T.vectorized(0, lanes) as lane:
        for i, j in tile:
            T.buffer_store(sums, T.float32(0), [i, j, lane])

    def step(*r: Any) -> None:
        with T.vectorized(0, lanes) as lane:
            weights = [T.bind(right(j, *r, lane)) for j in range(blocks)]
            for i in range(rows):
                value = T.bind(left(i, *r))
                for j in range(blocks):
                    T.buffer_store(sums, sums[i, j, lane] + value * weights[j], [i, j, lane])

    _nest(depth, step)
    return _copied(sums, rows, blocks, lanes, "float32")


def dot_product(
    rows: int,
    blocks: int,
    lanes: int,
    depth: Sequence[int],
    left: Callable[..., Any],
    right: Callable[..., Any],
    vnni: bool,
) -> Any:
    """As `product` for bytes, with int32 sums.

    left(i, *r) is (buffer, indices) of the first of 4 uint8; right(j, *r) is (buffer, indices) of lanes x 4 int8.
    """
    sums = local((rows, blocks, lanes), "int32")
    with T.vectorized(0, lanes) as lane:
        for i in range(rows):
            for j in range(blocks):
                T.buffer_store(sums, T.int32(0), [i, j, lane])

    def step_vnni(*r: Any) -> None:
        weights = []
        for j in range(blocks):
            buffer, indices = right(j, *r)
            weights.append(T.bind(buffer.vload([*indices, 0, 0], "int8x64")))
        for i in range(rows):
            buffer, indices = left(i, *r)
            four = T.reinterpret("int32", buffer.vload(list(indices), "uint8x4"))
            # LLVM 22 wants <64 x i8> operands here.
            value = T.bind(T.reinterpret("uint8x64", T.broadcast(four, 16)))
            for j in range(blocks):
                total = T.call_llvm_pure_intrin(
                    "int32x16",
                    T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512"),
                    sums.vload([i, j, 0], "int32x16"),
                    value,
                    weights[j],
                )
                T.buffer_store(sums, total, [i, j, T.ramp(0, 1, 16)])

    def step_plain(*r: Any) -> None:
        with T.vectorized(0, lanes) as lane:
            for i in range(rows):
                data, place = left(i, *r)
                for j in range(blocks):
                    weight, indices = right(j, *r)
                    total = sums[i, j, lane]
                    for q in range(4):
                        value = T.cast(data[(*place[:-1], place[-1] + q)], "int32")
                        total = total + value * T.cast(weight[(*indices, lane, q)], "int32")
                    T.buffer_store(sums, total, [i, j, lane])

    _nest(depth, step_vnni if vnni else step_plain)
    return _copied(sums, rows, blocks, lanes, "int32")


def _nest(depth: Sequence[int], step: Callable[..., None], *outer: Any) -> None:
    if not depth:
        step(*outer)
        return
    with T.serial(0, depth[0]) as index:
        _nest(depth[1:], step, *outer, index)


def _copied(sums: Any, rows: int, blocks: int, lanes: int, dtype: str) -> Any:
    found = local((rows, blocks, lanes), dtype)
    with T.vectorized(0, lanes) as lane:
        for i in range(rows):
            for j in range(blocks):
                T.buffer_store(found, sums[i, j, lane], [i, j, lane])
    return found
