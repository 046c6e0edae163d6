"""Functions of whole rows of an (m, k) tensor for LLVM CPUs: layer norm and softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from .emit import argument, kernel, local, loop, parts
from .functions import exp


@dataclass(frozen=True)
class RowSpec:
    """`layer_norm` (arguments x, weight (k,), bias (k,); Ba et al. 2016) or `softmax` (argument x) of every row."""

    op: str
    m: int
    k: int
    epsilon: float = 0.0
    lanes: int = 16
    threads: int = 1


def rows(spec: RowSpec) -> tvm.tirx.PrimFunc:
    """The function of (data, the operator's other arguments, output)."""
    with kernel() as (emitted, body):
        source = argument("data", (spec.m, spec.k))
        extra = [argument(name, (spec.k,)) for name in ("weight", "bias") if spec.op == "layer_norm"]
        out = argument("out", (spec.m, spec.k))

        def every_row() -> None:
            with loop(spec.m, spec.threads) as row:
                if spec.op == "layer_norm":
                    _layer_norm(spec, source, extra, out, row)
                else:
                    _softmax(spec, source, out, row)

        body(every_row)
    return emitted.function


def _layer_norm(spec: RowSpec, source: Any, extra: list[Any], out: Any, row: Any) -> None:
    count = T.float32(spec.k)
    mean = T.bind(reduce_row(spec.k, spec.lanes, lambda k: source[row, k], "sum") / count)

    def square(k: Any) -> Any:
        return (source[row, k] - mean) * (source[row, k] - mean)

    variance = reduce_row(spec.k, spec.lanes, square, "sum") / count
    factor = T.bind(T.float32(1) / T.sqrt(variance + T.float32(spec.epsilon)))
    weight, bias = extra

    def write(k: Any) -> None:
        T.buffer_store(out, (source[row, k] - mean) * factor * weight[k] + bias[k], [row, k])

    across(spec.k, spec.lanes, write)


def _softmax(spec: RowSpec, source: Any, out: Any, row: Any) -> None:
    most = T.bind(reduce_row(spec.k, spec.lanes, lambda k: source[row, k], "max"))
    across(spec.k, spec.lanes, lambda k: T.buffer_store(out, exp(source[row, k] - most), [row, k]))
    factor = T.bind(T.float32(1) / reduce_row(spec.k, spec.lanes, lambda k: out[row, k], "sum"))
    across(spec.k, spec.lanes, lambda k: T.buffer_store(out, out[row, k] * factor, [row, k]))


def across(extent: int, lanes: int, emit: Callable[[Any], None]) -> None:
    """Emits for every index of a row: vectors, and what is left as a narrower one."""
    for start, count, size in parts(extent, lanes):
        with T.serial(0, count) as part, T.vectorized(0, size) as lane:
            emit(start + part * size + lane)


def reduce_row(extent: int, lanes: int, value: Callable[[Any], Any], op: str) -> Any:
    """The sum or maximum of value(k) over a row, in four vectors that do not wait for each other."""
    ways = 4 if extent >= 8 * lanes else 1
    partial = local((ways, lanes))
    start = T.float32(0) if op == "sum" else T.min_value("float32")
    with T.vectorized(0, lanes) as lane:
        for way in range(ways):
            T.buffer_store(partial, start, [way, lane])

    def join(a: Any, b: Any) -> Any:
        return a + b if op == "sum" else T.max(a, b)

    done = 0
    for first, count, size in parts(extent, ways * lanes):
        if size < ways * lanes:
            break
        with T.serial(0, count) as part, T.vectorized(0, lanes) as lane:
            for way in range(ways):
                found = value(first + part * size + way * lanes + lane)
                T.buffer_store(partial, join(partial[way, lane], found), [way, lane])
        done = first + count * size
    for first, count, size in parts(extent - done, lanes):
        with T.serial(0, count) as part, T.vectorized(0, size) as lane:
            found = value(done + first + part * size + lane)
            T.buffer_store(partial, join(partial[0, lane], found), [0, lane])
    width = lanes
    with T.vectorized(0, lanes) as lane:
        for way in range(1, ways):
            T.buffer_store(partial, join(partial[0, lane], partial[way, lane]), [0, lane])
    while width > 1:  # lanes are a power of two
        width //= 2
        with T.vectorized(0, width) as lane:
            T.buffer_store(partial, join(partial[0, lane], partial[0, width + lane]), [0, lane])
    return partial[0, 0]
