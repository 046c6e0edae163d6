"""Values that only lie differently in memory than others: parts and permutations, which kernels can read in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from .cpu.attention import Strided
from .tvm_graph import Array, Graph, Node, static_shape

_MOVES = frozenset(
    f"relax.{name}" for name in ("permute_dims", "reshape", "squeeze", "expand_dims", "take", "strided_slice", "split")
)


def in_place(graph: Graph, var: Any) -> tuple[Any, Strided]:
    """The earliest value whose elements, unmoved, are those of a variable of the graph, and where they lie in it."""
    path: list[tuple[Node, int]] = []
    base = var
    while (found := _step(graph, base)) is not None:
        node, index = found
        path.append((node, index))
        base = node.args[0]
    path.reverse()
    # Where a step would have to copy, what it copies to is where the search begins anew.
    for start in range(len(path) + 1):
        placed = _placed(graph, base, path[start:])
        if placed is not None:
            return base, placed
        base = graph.resolve(path[start][0].var) if path[start][0].op != "relax.split" else None
        if base is None:
            break
    return var, _whole(static_shape(var))


def _step(graph: Graph, var: Any) -> tuple[Node, int] | None:
    """The node that moves another value's elements to this one, and which of its results that is."""
    node, index = graph.producers.get(var), 0
    if node is not None and node.op == "TupleGetItem":
        index, node = int(node.expr.index), graph.producers.get(node.args[0])
        if node is not None and node.op == "tuple":
            inner = node.args[index]
            return _step(graph, inner) if isinstance(inner, relax.Var) else None
    if node is None or node.op not in _MOVES or not isinstance(node.args[0], relax.Var):
        return None
    return None if node.args[0] in graph.constants else (node, index)


def _whole(shape: tuple[int, ...]) -> Strided:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return Strided(shape, 0, tuple(strides[-len(shape) :]))


def _placed(graph: Graph, base: Any, path: list[tuple[Node, int]]) -> Strided | None:
    """Where the end of a path lies in its base; None where a step has to copy."""
    shape = static_shape(base)
    # Of one byte: only its shape, strides and address are looked at, never what is there.
    memory = np.zeros(1, np.int8)
    view = np.lib.stride_tricks.as_strided(memory, shape, _whole(shape).strides)
    for node, index in path:
        moved = _moved(graph, node, index, view)
        if moved is None:
            return None
        view = moved
    return Strided(shape, view.ctypes.data - memory.ctypes.data, tuple(view.strides))


def _moved(graph: Graph, node: Node, index: int, view: Array) -> Array | None:
    attributes: Any = node.expr.attrs
    if node.op == "relax.permute_dims":
        return view.transpose(None if attributes.axes is None else [int(axis) for axis in attributes.axes])
    if node.op in ("relax.reshape", "relax.squeeze", "relax.expand_dims"):
        try:
            return view.reshape(node.shape, copy=False)
        except ValueError:
            return None
    if node.op == "relax.take":
        return _taken(graph, node, view)
    if node.op == "relax.split":
        axis, sections = int(attributes.axis) % view.ndim, attributes.indices_or_sections
        if hasattr(sections, "__len__"):
            ends = [0, *(int(end) for end in sections), view.shape[axis]]
        else:
            count, size = int(sections), view.shape[axis]
            ends = [min(size, -(-size // count) * part) for part in range(count + 1)]
        return view[(slice(None),) * axis + (slice(ends[index], ends[index + 1]),)]
    return _sliced(node, view)


def _taken(graph: Graph, node: Node, view: Array) -> Array | None:
    """One index of an axis; of several the distances need not be equal."""
    indices, axis = graph.array(node.args[1]), node.expr.attrs.axis
    if indices is None or axis is None or indices.size != 1 or indices.ndim > 1:
        return None
    place, axis = int(indices.reshape(())), int(axis) % view.ndim
    if not 0 <= place < view.shape[axis]:
        return None
    # With the ellipsis a value of no axes is a view too.
    return view[(slice(None),) * axis + (place if indices.ndim == 0 else slice(place, place + 1), ...)]


def _sliced(node: Node, view: Array) -> Array | None:
    try:
        axes, begins, ends, *rest = (_numbers(part) for part in node.expr.args[1:])
    except (TypeError, ValueError, AttributeError):
        return None
    strides = rest[0] if rest else [1] * len(axes)
    slices = [slice(None)] * view.ndim
    for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
        if begin < 0 or end < 0 or stride < 1:
            return None
        slices[axis % view.ndim] = slice(begin, end, stride)
    found = view[tuple(slices)]
    return found if found.shape == node.shape else None


def _numbers(fields: Any) -> list[int]:
    return [int(getattr(field, "value", field)) for field in fields.fields]
