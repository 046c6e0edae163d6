"""What the kernels that are written loop by loop have in common: arguments, buffers, tails, register tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil, prod
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .machine import Dot

# The sum of (input, block, lane).
Sums = Callable[[Any, Any, Any], Any]


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


# TVM puts what is smaller on the stack, where LLVM makes registers of it; for the rest it calls the runtime, in every
# turn of a parallel loop.
_STACK_BYTES = 1024


def local(shape: Sequence[int], dtype: str = "float32") -> Any:
    """A buffer of the function's own."""
    # Of any other scope than this one TVM puts nothing on the stack.
    return T.alloc_buffer(tuple(shape), dtype, scope="global", layout=None, align=64)


class Registers:
    """Vectors that are to stay in registers, in as few buffers as are small enough for the stack.

    The first index must be a number.
    """

    def __init__(self, shape: Sequence[int], dtype: str = "float32") -> None:
        row = prod(shape[1:]) * int(tvm.DataType(dtype).itemsize)
        self._rows = max(1, (_STACK_BYTES - 1) // row)
        pieces = [min(self._rows, shape[0] - start) for start in range(0, shape[0], self._rows)]
        self._pieces = [local((rows, *shape[1:]), dtype) for rows in pieces]

    def __getitem__(self, indices: tuple[Any, ...]) -> Any:
        buffer, place = self._at(indices)
        return buffer[tuple(place)]

    def store(self, value: Any, *indices: Any) -> None:
        """Writes one element, or a vector where the last index is a ramp."""
        buffer, place = self._at(indices)
        T.buffer_store(buffer, value, place)

    def vload(self, indices: tuple[Any, ...], dtype: str) -> Any:
        """A vector that begins there."""
        buffer, place = self._at(indices)
        return buffer.vload(place, dtype)

    def _at(self, indices: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        first, *rest = indices
        return self._pieces[first // self._rows], [first % self._rows, *rest]


def view(buffer: Any, shape: Sequence[Any], dtype: str) -> Any:
    """The same memory in another shape."""
    return T.decl_buffer(tuple(shape), dtype, data=buffer.data, layout=None)


def hidden(number: int) -> Any:
    """A number that LLVM does not know, so that it does not write a loop of so many turns out one after the other.

    What it writes out it gives registers together, which ends as in `cover`.
    """
    fence = T.llvm_lookup_intrinsic_id("llvm.arithmetic.fence")
    return T.bind(T.cast(T.call_llvm_pure_intrin("float32", fence, T.float32(number)), "int32"))


def loop(extent: int, threads: int = 1) -> Any:
    """A loop around tiles, shared by the threads where there are several."""
    if extent == 1:
        return T.serial(0, 1)
    return T.parallel(0, extent) if threads > 1 else T.serial(0, hidden(extent))


@contextmanager
def cover(extent: int, size: int, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """A loop over pieces of one size that cover an extent: (number of the piece, where it begins).

    The last one begins early enough and computes some outputs once more. With a smaller piece for the rest a kernel
    would hold its innermost loops twice, of which LLVM gave one three registers of sixteen (measured).
    """
    with loop(ceil(extent / size), threads) as number:
        first = number * size
        yield number, T.bind(T.min(first, extent - size) if extent % size else first)


def when(conditions: Sequence[Any], emit: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """Emits what happens where all conditions hold, and what where one does not."""
    if not conditions:
        emit()
        return
    condition = conditions[0]
    for other in conditions[1:]:
        condition = T.And(condition, other)
    with T.If(condition):
        with T.Then():
            emit()
        if otherwise is not None:
            with T.Else():
                otherwise()


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
    start: Callable[[int, int, Any], Any] | None = None,
    parts: int = 0,
) -> Sums:
    """Sums of left(i, *r) * right(j, *r, lane) over the indices r of `depth`, in registers: (rows, blocks, lanes).

    They begin at start(i, j, lane), or at zero. The result gives the sum of (i, j, lane); i and j must be numbers.
    With `parts` a turn of the loops is so many steps, whose number follows `*r`.
    """
    sums = Registers((rows, blocks, lanes))
    tile = [(i, j) for i in range(rows) for j in range(blocks)]
    with T.vectorized(0, lanes) as lane:
        for i, j in tile:
            sums.store(T.float32(0) if start is None else start(i, j, lane), i, j, lane)

    def step(*r: Any) -> None:
        with T.vectorized(0, lanes) as lane:
            for place in [(*r, part) for part in range(parts)] if parts else [r]:
                weights = [T.bind(right(j, *place, lane)) for j in range(blocks)]
                for i in range(rows):
                    value = T.bind(left(i, *place))
                    for j in range(blocks):
                        sums.store(sums[i, j, lane] + value * weights[j], i, j, lane)

    _nest(depth, step)
    return lambda i, j, lane: sums[i, j, lane]


# LLVM's names of the instructions by the lanes of their int32 results.
_QUADS = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256"}
_WORDS = {16: "llvm.x86.avx512.vpdpwssd.512", 8: "llvm.x86.avx512.vpdpwssd.256"}
_MADD_BYTES = {
    16: "llvm.x86.avx512.pmaddubs.w.512",
    8: "llvm.x86.avx2.pmadd.ub.sw",
    4: "llvm.x86.ssse3.pmadd.ub.sw.128",
}
_MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}


def dot_product(
    rows: int,
    blocks: int,
    lanes: int,
    depth: Sequence[int],
    left: Callable[..., Any],
    right: Callable[..., Any],
    dot: Dot,
    start: Callable[[int, int, Any], Any] | None = None,
    nibbles: bool = False,
) -> Sums:
    """As `product` for bytes, with int32 sums, or for bfloat16, with float32 sums.

    left(i, *r) is (buffer, indices) of the first of `dot.depth` inputs; right(j, *r) is (buffer, indices) of the first
    of lanes x `dot.depth` weights. With `nibbles` a turn of the loops is two steps: the inputs follow each other, and
    a byte holds a weight + 8 of the first step in its low half, one of the second in its high half.
    """
    sums = Registers((rows, blocks, lanes), dot.sums_type)
    whole, kind = f"{dot.sums_type}x{lanes}", f"x{lanes * dot.depth}"
    tile = [(i, j) for i in range(rows) for j in range(blocks)]
    zero = T.broadcast(tvm.tirx.const(0, dot.sums_type), lanes)
    for i, j in tile:
        first = zero if start is None else start(i, j, T.ramp(0, 1, lanes))
        sums.store(first, i, j, T.ramp(0, 1, lanes))

    def operands(*r: Any) -> Iterator[tuple[list[Any], Callable[[int], Any]]]:
        """The weights of one step and a function to its inputs; of two steps where weights are nibbles."""
        loaded = []
        for j in range(blocks):
            buffer, indices = right(j, *r)
            weight = buffer.vload([*indices, 0, 0], str(buffer.dtype) + kind)
            if dot.floats:
                weight = T.reinterpret(f"int32x{lanes}", weight)
            # Bytes are widened as they are read, which costs less than twice as much memory.
            loaded.append(T.bind(T.cast(weight, "int16" + kind) if dot.data == "int16" else weight))
        for number in range(2 if nibbles else 1):
            weights = [T.bind(_nibble(weight, number, kind)) for weight in loaded] if nibbles else loaded
            yield weights, partial(value, number * dot.depth, r)

    def value(ahead: int, r: tuple[Any, ...], i: int) -> Any:
        buffer, (*indices, last) = left(i, *r)
        last = last + ahead if ahead else last
        if dot.depth == 1:
            return T.bind(T.broadcast(T.cast(buffer[(*indices, last)], "int32"), lanes))
        near = T.broadcast(T.reinterpret("int32", buffer.vload([*indices, last], f"{dot.data}x{dot.depth}")), lanes)
        return T.bind(near if dot.floats else T.reinterpret(dot.data + kind, near))

    def add(i: int, j: int, change: Callable[[Any], Any]) -> None:
        sums.store(change(sums.vload((i, j, 0), whole)), i, j, T.ramp(0, 1, lanes))

    def step(*r: Any) -> None:
        for weights, near_of in operands(*r):
            for i in range(rows):
                near = near_of(i)
                for j in range(blocks):
                    weight = weights[j]
                    add(i, j, lambda total, near=near, w=weight: dot_step(dot, lanes, total, near, w))  # type: ignore[misc]

    outer, inner = _together(depth, max(1, dot.together // 2) if nibbles else dot.together)
    if not inner:
        _nest(depth, step)
        return lambda i, j, lane: sums[i, j, lane]
    words = Registers((rows, blocks, 2 * lanes), "int16")
    kind16 = f"int16x{2 * lanes}"

    def words_step(*r: Any) -> None:
        for weights, near_of in operands(*r):
            for i in range(rows):
                near = near_of(i)
                for j in range(blocks):
                    total = words.vload((i, j, 0), kind16) + _pairs(lanes, near, weights[j])
                    words.store(_fenced(total, kind16), i, j, T.ramp(0, 1, 2 * lanes))

    def group(*r: Any) -> None:
        for i, j in tile:
            words.store(T.broadcast(T.int16(0), 2 * lanes), i, j, T.ramp(0, 1, 2 * lanes))
        _nest(inner, lambda *s: words_step(*_joined(r, s, depth, inner)))
        for i, j in tile:
            found = words.vload((i, j, 0), kind16)
            add(i, j, lambda total, found=found: _fenced(total + _widened(lanes, found), whole))  # type: ignore[misc]

    _nest(outer, group)
    return lambda i, j, lane: sums[i, j, lane]


def _nibble(packed: Any, number: int, kind: str) -> Any:
    """The weights in the low (0) or high (1) halves of bytes, as int8."""
    lanes = int(kind[1:])
    four, low, eight = (T.broadcast(T.uint8(k), lanes) for k in (4, 15, 8))
    half = T.shift_right(packed, four) if number else T.bitwise_and(packed, low)
    return T.reinterpret("int8" + kind, half - eight)


def _together(depth: Sequence[int], steps: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The loops around, and the innermost ones of which all turns together are at most so many steps.

    The last of the loops around and the first of the inner ones may be two parts of one.
    """
    outer, inner = list(depth), list[int]()
    while outer and prod(inner) * outer[-1] <= steps:
        inner.insert(0, outer.pop())
    room = steps // prod(inner)
    part = max((size for size in range(1, room + 1) if outer and outer[-1] % size == 0), default=1)
    if prod(inner) * part == 1:
        return tuple(depth), ()
    if part > 1:
        outer[-1] //= part
        inner.insert(0, part)
    return tuple(outer), tuple(inner)


def _joined(outer: Sequence[Any], inner: Sequence[Any], depth: Sequence[int], sizes: Sequence[int]) -> tuple[Any, ...]:
    """The indices of `depth` from those of the two parts that `_together` gives."""
    if len(outer) + len(inner) == len(depth):
        return (*outer, *inner)
    return (*outer[:-1], outer[-1] * sizes[0] + inner[0], *inner[1:])


def dot_step(dot: Dot, lanes: int, total: Any, value: Any, weight: Any) -> Any:
    """The sums after one step."""
    whole = f"{dot.sums_type}x{lanes}"
    if dot.name == "bfloat16":
        return T.call_extern(whole, _PAIRS_OF_BFLOAT16, total, value, weight)
    if dot.name == "halves":
        products = zip(_as_floats(value, lanes), _as_floats(weight, lanes), strict=True)
        return total + sum(a * b for a, b in products)
    if dot.name == "vnni":
        return T.call_llvm_pure_intrin(whole, T.llvm_lookup_intrinsic_id(_QUADS[lanes]), total, value, weight)
    if dot.name == "sdot":
        number = T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sdot")
        return T.call_llvm_pure_intrin(whole, number, total, value, weight)
    if dot.name == "words":
        return T.call_llvm_pure_intrin(whole, T.llvm_lookup_intrinsic_id(_WORDS[lanes]), total, value, weight)
    if dot.name == "madd":
        number = T.llvm_lookup_intrinsic_id(_MADD[lanes])
        return _fenced(total + T.call_llvm_pure_intrin(whole, number, value, weight), whole)
    if dot.name == "bytes":
        return _fenced(total + _widened(lanes, _pairs(lanes, value, weight)), whole)
    return total + value * T.cast(weight, whole)


def _as_floats(pairs: Any, lanes: int) -> tuple[Any, Any]:
    """The first and the second of pairs of bfloat16, each pair held in an int32, as float32."""
    first = T.shift_left(pairs, T.broadcast(T.int32(16), lanes))
    second = T.bitwise_and(pairs, T.broadcast(T.int32(-(1 << 16)), lanes))
    return T.reinterpret(f"float32x{lanes}", first), T.reinterpret(f"float32x{lanes}", second)


_PAIRS_OF_BFLOAT16 = "planish_pairs_of_bfloat16"


def importing(dot: Dot | None, lanes: int, emit: Callable[[], None]) -> Callable[[], None]:
    """The body of a kernel together with the function that `dot_step` calls, which LLVM puts in its place.

    TVM makes float32 of all bfloat16 before it generates code, so that the instruction's operands must pass it as
    int32.
    """
    if dot is None or dot.name != "bfloat16":
        return emit
    sums, pairs, halves = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
    name = f"@llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
    source = f"""declare {sums} {name}({sums}, {halves}, {halves})
define {sums} @{_PAIRS_OF_BFLOAT16}({sums} %total, {pairs} %value, {pairs} %weight) {{
  %a = bitcast {pairs} %value to {halves}
  %b = bitcast {pairs} %weight to {halves}
  %result = call {sums} {name}({sums} %total, {halves} %a, {halves} %b)
  ret {sums} %result
}}
"""

    def with_function() -> None:
        with T.attr(T.int32(0), "pragma_import_llvm", source):
            emit()

    return with_function


def _pairs(lanes: int, value: Any, weight: Any) -> Any:
    """The sums of two neighbouring products of bytes, in 16 bits."""
    number = T.llvm_lookup_intrinsic_id(_MADD_BYTES[lanes])
    return T.call_llvm_pure_intrin(f"int16x{2 * lanes}", number, value, weight)


def _widened(lanes: int, words: Any) -> Any:
    """The sums of two neighbouring 16-bit numbers, in 32 bits."""
    one = T.broadcast(T.int16(1), 2 * lanes)
    return T.call_llvm_pure_intrin(f"int32x{lanes}", T.llvm_lookup_intrinsic_id(_MADD[lanes]), words, one)


def _fenced(total: Any, kind: str) -> Any:
    """The same vector of integers, past which LLVM moves no additions; no instruction.

    It would add the products of several steps first, and keep so many that it runs out of registers (measured: 0.6 of
    the speed).
    """
    number = T.llvm_lookup_intrinsic_id("llvm.arithmetic.fence")
    bits, lanes = kind.removeprefix("int").split("x")
    floats = f"float32x{int(lanes) * int(bits) // 32}"
    return T.reinterpret(kind, T.call_llvm_pure_intrin(floats, number, T.reinterpret(floats, total)))


def copied(sums: Sums, rows: int, blocks: int, lanes: int, dtype: str = "float32") -> Sums:
    """The registers of sums(i, j, lane) in memory, so that i and j may be anything."""
    found = local((rows, blocks, lanes), dtype)
    with T.vectorized(0, lanes) as lane:
        for i in range(rows):
            for j in range(blocks):
                T.buffer_store(found, sums(i, j, lane), [i, j, lane])
    return lambda i, j, lane: found[i, j, lane]


def _nest(depth: Sequence[int], step: Callable[..., None], *outer: Any) -> None:
    if not depth:
        step(*outer)
        return
    with T.serial(0, depth[0]) as index:
        _nest(depth[1:], step, *outer, index)
