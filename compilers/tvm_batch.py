"""A program whose first layers take a few images of the batch at a time: two programs, and how often the first runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from .cpu.machine import Machine
from .cpu.sub_batch import Layer, sub_batch
from .tvm_frontend import Imported
from .tvm_graph import UNARY, Graph, Node, chains, range_of, same, static_shape

# Operators that compute an image of their result from that image alone, whatever their attributes.
_ALONE = frozenset(
    {
        *UNARY,
        "quantize", "qconv2d", "hardswish", "hardsigmoid", "relax.nn.conv2d", "relax.nn.max_pool2d",
        "relax.nn.avg_pool2d", "relax.nn.adaptive_avg_pool2d", "relax.nn.relu6", "relax.clip", "relax.exp",
        "relax.sqrt", "relax.nn.leakyrelu", "relax.image.resize2d",
    }
)  # fmt: skip
_BINARY = frozenset(f"relax.{name}" for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum"))
# Winograd's weights are so many times as large; which layers take that form is not known yet.
_WINOGRAD = 2.25


@dataclass(frozen=True)
class Split:
    """`first` takes the images of a part, `rest` the results of all parts; their one value is a (n, c, h, w) tensor."""

    first: Imported
    rest: Imported
    parts: int


def split(imported: Imported, graph: Graph, machine: Machine) -> Split | None:
    """The program in two where that is estimated to pay; None where not, or where images cannot be told apart.

    Args:
        imported: A program of one input (batch, ...).
        graph: The same.
        machine: The CPU.
    """
    if len(graph.params) != 1 or len(static_shape(graph.params[0])) != 4 or static_shape(graph.params[0])[0] < 2:
        return None
    batch = static_shape(graph.params[0])[0]
    alone = _alone(graph, batch)
    found = sub_batch(_layers(graph, batch), _cuts(graph, len(alone)), batch, machine)
    if found is None:
        return None
    last = graph.nodes[found.last]
    products = sum(node.index <= found.last for node in graph.nodes if node.index in graph.sites)
    first, rest = _emitted(graph, alone[: found.last + 1], found.images), _remaining(graph, last)
    return Split(
        replace(imported, module=first, sites=imported.sites[:products]),
        replace(imported, module=rest, sites=imported.sites[products:]),
        batch // found.images,
    )


def _alone(graph: Graph, batch: int) -> list[Node]:
    """The nodes up to the first that may mix images: what they compute has the images in front."""
    carrying = {graph.params[0]}
    found = []
    for node in graph.nodes:
        variables = [graph.resolve(arg) for arg in node.args if isinstance(arg, relax.Var)]
        images = [var for var in variables if var in carrying]
        known = all(var in carrying or var in graph.constants for var in variables)
        if not (images and known and _is_tensor(node.var) and node.shape[:1] == (batch,)):
            break
        if not _keeps_images_apart(graph, node, images):
            break
        carrying.add(node.var)
        found.append(node)
    return found


def _keeps_images_apart(graph: Graph, node: Node, images: list[Any]) -> bool:
    """Whether a node computes every image of its result from that image of its inputs `images` alone."""
    rank, attributes = len(static_shape(images[0])), cast("Any", node.expr).attrs
    if (
        node.op not in _BINARY
        and node.op != "relax.concat"
        and not (len(images) == 1 and same(node.args[0], images[0]))
    ):
        return False  # an image's own values as weights
    if node.op in _ALONE:
        return True
    if node.op in _BINARY:
        if any(len(static_shape(image)) != len(node.shape) for image in images):
            return False  # the images of the smaller one would lie along another axis
        # What is done to every image alike has one row for all of them.
        others = [graph.array(arg) for arg in node.args if not any(same(arg, image) for image in images)]
        return all(array is None or array.ndim < rank or array.shape[0] == 1 for array in others)
    if node.op == "relax.nn.softmax":
        return int(attributes.axis) % rank != 0
    if node.op == "relax.concat":  # a constant among them would have a row for every image
        return len(images) == len(node.args) and attributes.axis is not None and int(attributes.axis) % rank != 0
    if node.op in ("relax.mean", "relax.sum", "relax.max", "relax.nn.layer_norm"):
        axes = attributes.axes if node.op == "relax.nn.layer_norm" else attributes.axis
        return axes is not None and all(int(axis) % rank for axis in axes)
    if node.op == "relax.nn.pad":
        return all(int(width) == 0 for width in list(attributes.pad_width)[:2])
    if node.op == "relax.strided_slice":
        return all(int(getattr(axis, "value", 0)) % rank for axis in node.expr.args[1].fields)
    if node.op == "relax.permute_dims":
        return attributes.axes is not None and int(attributes.axes[0]) == 0
    if node.op == "relax.matmul":
        weight = graph.array(node.args[1])
        return weight is not None and weight.ndim <= 2
    return node.op == "relax.reshape" and static_shape(images[0])[0] == node.shape[0]


def _cuts(graph: Graph, count: int) -> set[int]:
    """Of the first `count` nodes those behind which only their own value is read, and inside of no kernel."""
    kernels = chains(graph).values()
    ends = {chain.last.index for chain in kernels}
    inside = {index for chain in kernels for index in [chain.head.index, *range_of(graph, chain)]} - ends
    found: set[int] = set()
    open_until = max((user.index for user in graph.users[graph.params[0]]), default=0)
    for node in graph.nodes[:count]:
        # Bytes that no kernel writes exist only inside of those that read them.
        written = node.op != "quantize" or node.index in ends
        ended = node.index not in inside and open_until <= node.index and not same(node.var, graph.output)
        if ended and written and len(node.shape) == 4:
            found.add(node.index)
        open_until = max([open_until, *(user.index for user in graph.users[node.var])])
    return found


def _layers(graph: Graph, batch: int) -> list[Layer]:
    """What every node moves for one image, as the kernel that computes it: a kernel counts at its head."""
    kernels = chains(graph)
    inside = {index for chain in kernels.values() for index in range_of(graph, chain)}
    found = []
    for node in graph.nodes:
        if node.index in inside:
            found.append(Layer(0, 0, 0))
            continue
        chain = kernels.get(node.index)
        values = [arg for arg in node.args if _is_tensor(arg) and graph.array(arg) is None]
        values += [step.operand for step in chain.steps if step.operand is not None] if chain else []
        moved = sum(_bytes(var) for var in [*values, chain.last.var if chain else node.var] if _is_tensor(var))
        # A quantisation that no kernel ends with is done by those that read it, where they copy.
        apart = node.op != "quantize"
        found.append(Layer(moved // batch if apart else 0, *_weights(graph, node)))
    return found


def _weights(graph: Graph, node: Node) -> tuple[int, int]:
    """Bytes of the weights as kernels read them, and multiply-accumulates of an image."""
    if node.op in ("qconv2d", "qlinear", "wlinear"):
        weight = node.mark.attributes["weight"] if node.mark else None
    else:
        weight = graph.array(node.args[1]) if node.op in ("relax.nn.conv2d", "relax.matmul") else None
    if weight is None:
        return 0, 0
    outputs = weight.shape[0 if weight.ndim == 4 or node.mark else 1]
    square = weight.ndim == 4 and weight.shape[2:] == (3, 3) and weight.shape[1] > 1 and node.mark is None
    macs = prod(node.shape[1:]) * (weight.size // outputs)
    return int(weight.nbytes * (_WINOGRAD if square else 1)), macs


def _is_tensor(arg: Any) -> bool:
    return isinstance(arg, relax.Var) and isinstance(arg.ty, relax.TensorType)


def _bytes(var: Any) -> int:
    return prod(static_shape(var)) * int(tvm.DataType(str(var.ty.dtype)).itemsize)


def _emitted(graph: Graph, nodes: list[Node], images: int) -> tvm.IRModule:
    """The nodes for so many images, the last one's value as the result."""
    builder = relax.BlockBuilder()
    old = graph.params[0]
    param = relax.Var(old.name, relax.TensorType((images, *static_shape(old)[1:]), str(old.ty.dtype)))
    values: dict[Any, Any] = {old: param}
    with builder.function("main", [param]):
        with builder.dataflow():
            for node in nodes:
                call = substituted(node.expr, lambda var: _value(graph, values, var))
                if node.mark is not None:
                    kind = relax.TensorType((images, *node.shape[1:]), str(node.var.ty.dtype))
                    call = relax.op.call_dps_packed(str(call.args[0].global_symbol), call.args[1], kind)
                else:
                    arguments = list(call.args)
                    if node.op == "relax.reshape":
                        arguments[1] = relax.ShapeExpr((images, *node.shape[1:]))
                    call = relax.Call(call.op, arguments, call.attrs)
                values[node.var] = builder.emit(call)
            result = builder.emit_output(values[nodes[-1].var])
        builder.emit_func_output(result)
    return builder.get()


def _remaining(graph: Graph, last: Node) -> tvm.IRModule:
    """The nodes behind `last`, whose value is the parameter."""
    builder = relax.BlockBuilder()
    param = relax.Var("images", last.var.ty)
    values: dict[Any, Any] = {last.var: param}
    with builder.function("main", [param]):
        with builder.dataflow():
            for node in graph.nodes[last.index + 1 :]:
                values[node.var] = builder.emit(substituted(node.expr, lambda var: _value(graph, values, var)))
            result = builder.emit_output(_value(graph, values, graph.output))
        builder.emit_func_output(result)
    return builder.get()


def _value(graph: Graph, values: dict[Any, Any], var: Any) -> Any:
    var = graph.resolve(var)
    if var in values:
        return values[var]
    return relax.const(graph.constants[var])


def substituted(expr: Any, value: Callable[[Any], Any]) -> Any:
    """An expression with every variable replaced."""
    return _Substitute(value).visit_expr(expr)


@mutator
class _Substitute(PyExprMutator):  # type: ignore[misc]
    def __init__(self, value: Callable[[Any], Any]) -> None:
        super().__init__()
        self._value = value

    def visit_var_(self, op: Any) -> Any:
        return self._value(op)

    def visit_dataflow_var_(self, op: Any) -> Any:
        return self._value(op)
