"""A Relax graph to calls of scheduled CPU kernels on blocked tensors; what has none stays in Relax for the fallback.

Every value may exist plain (as torch has it) and blocked (n, C/lanes, h, w, lanes); the other form is made where a
reader needs it, once. So a chain of convolutions, additions and activations stays blocked from end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import tvm
from tvm import relax

from .cpu.convspec import EXPONENTIAL_STEPS, ConvSpec, Step
from .cpu.epilogue import activation
from .cpu.machine import Machine
from .cpu.packing import per_channel
from .cpu.tiles import Choice
from .tvm_batch import Split, substituted
from .tvm_graph import UNARY, Array, Graph, Node, chains, range_of, static_shape
from .tvm_lower_conv import lower_convolution
from .tvm_lower_dense import lower_dense
from .tvm_lower_pool import lower_pooling
from .tvm_lower_rows import lower_rows
from .tvm_padding import fold_padding
from .tvm_values import Kernel, Values

# Elementwise operators that keep a lane of zeros finite, so they may run on blocked tensors with unused lanes.
_BLOCKED_ELEMENTWISE = {
    "relax.nn.relu6",
    "relax.clip",
    "relax.add",
    "relax.subtract",
    "relax.multiply",
}


@dataclass(frozen=True)
class Lowered:
    """A module whose `main` calls kernels by their symbols, the kernels, and (symbol, site) of every call in order.

    `convolutions` are those of the program with how each is computed, and the largest sum of its weights.
    """

    module: tvm.IRModule
    kernels: list[Kernel]
    calls: list[tuple[str, str]]
    convolutions: dict[ConvSpec, tuple[Choice, int]]


def lower(graph: Graph, target: Machine, context: object = None) -> Lowered:
    """A graph in kernels; `context` as in `Values`."""
    fold_padding(graph)
    values = Values(graph, target, context)
    _Lowering(values).function("main")
    return Lowered(values.builder.get(), values.kernels, values.calls, values.convolutions)


def lower_split(found: Split, target: Machine, context: object = None) -> Lowered:
    """A split program in kernels: `main` calls one function for every part of the batch, and one for the rest.

    What goes from one to the other stays blocked.
    """
    graphs = Graph(found.first), Graph(found.rest)
    for graph in graphs:
        fold_padding(graph)
    first = Values(graphs[0], target, context)
    rest = Values(graphs[1], target, context, beside=first)
    part = _Lowering(first).function("part", blocked_result=True)
    end = _Lowering(rest).function("rest", blocked_input=True)
    builder, (old,) = first.builder, first.graph.params
    images, *shape = static_shape(old)
    param = relax.Var(old.name, relax.TensorType((found.parts * images, *shape), str(old.ty.dtype)))
    with builder.function("main", [param]):
        with builder.dataflow():
            starts = range(0, found.parts * images, images)
            inputs = [builder.emit(relax.op.strided_slice(param, [0], [i], [i + images])) for i in starts]
            results = [builder.emit(relax.Call(part, [value])) for value in inputs]
            joined = builder.emit(relax.op.concat(results, axis=0))
            result = builder.emit_output(relax.Call(end, [joined]))
        builder.emit_func_output(result)
    return Lowered(builder.get(), first.kernels, first.calls * found.parts + rest.calls, first.convolutions)


class _Lowering:
    def __init__(self, values: Values) -> None:
        self.graph = graph = values.graph
        self.values = values
        self.lanes = values.lanes
        self.builder = self.values.builder
        self.plain, self.blocked = self.values.plain, self.values.blocked
        self.chains = chains(graph)
        self.inside = {i: chain for chain in self.chains.values() for i in range_of(graph, chain)}

    def function(self, name: str, *, blocked_input: bool = False, blocked_result: bool = False) -> Any:
        """Adds the graph to the module as a function that takes and returns plain tensors, or blocked ones."""
        forms = self.blocked if blocked_input else self.plain
        kinds = [self.values.blocked_type(p) if blocked_input else p.ty for p in self.graph.params]
        params = [relax.Var(p.name, kind) for p, kind in zip(self.graph.params, kinds, strict=True)]
        with self.builder.function(name, params, private=name != "main"):
            forms |= dict(zip(self.graph.params, params, strict=True))
            with self.builder.dataflow():
                for node in self.graph.nodes:
                    self._node(node)
                form = self.values.as_blocked if blocked_result else self.values.as_plain
                result = self.builder.emit_output(form(self.graph.output))
            return self.builder.emit_func_output(result)

    def _node(self, node: Node) -> None:
        chain = self.chains.get(node.index) or self.inside.get(node.index)
        if chain is not None:
            if node.index == chain.last.index:
                is_convolution = chain.head.op in ("relax.nn.conv2d", "qconv2d")
                (lower_convolution if is_convolution else lower_dense)(self.values, chain)
            return
        if node.op == "quantize":
            if all(user.op in ("qconv2d", "qlinear") for user in self.graph.users[node.var]):
                return  # its readers quantise where they pad
            source = self.values.as_plain(node.args[0])
            assert node.mark is not None
            self.plain[node.var] = (
                self.values.bfloat16(source)
                if node.mark.bfloat16
                else self.values.quantized(source, *self.values.quantizer(node.var))
            )
        elif node.mark is not None or (node.op in UNARY and str(node.var.ty.dtype) == "float32"):
            self._activation(node)
        elif not (lower_pooling(self.values, node) or lower_rows(self.values, node) or self._blocked_node(node)):
            self._plain_node(node)

    def _activation(self, node: Node) -> None:
        source = node.args[0]
        step = Step(UNARY.get(node.op, node.op))
        forms = self.blocked if source in self.blocked else self.plain
        form = self.blocked[source] if source in self.blocked else self.values.as_plain(source)
        forms[node.var] = self.values.elementwise(
            form, lambda v: activation(step, v), step.op, fuse=step.op not in EXPONENTIAL_STEPS
        )

    def _blocked_node(self, node: Node) -> bool:
        """Emits an operator on blocked operands where that is the same computation."""
        tensors = [a for a in node.args if isinstance(a, relax.Var)]
        if not tensors or not all(a in self.blocked for a in tensors):
            return False
        if node.op in _BLOCKED_ELEMENTWISE and all(_channels(a) == _channels(node.var) for a in tensors):
            arguments = []
            for arg in node.args:
                array = self.graph.array(arg) if not isinstance(arg, relax.Var) or arg in self.graph.constants else None
                if array is not None:
                    shaped = self._blocked_constant(array, node.shape[1])
                    if shaped is None:
                        return False
                    arguments.append(shaped)
                else:
                    arguments.append(self.blocked[arg] if isinstance(arg, relax.Var) else arg)
            self.blocked[node.var] = self.builder.emit(relax.Call(node.expr.op, arguments, node.expr.attrs))
            return True
        whole = all(len(static_shape(a)) == 4 and static_shape(a)[1] % self.lanes == 0 for a in tensors)
        if node.op == "relax.concat" and whole and int(node.expr.attrs.axis) % 4 == 1:
            self.blocked[node.var] = self.builder.emit(relax.op.concat([self.blocked[a] for a in tensors], axis=1))
            return True
        return False

    def _blocked_constant(self, array: Array, channels: int) -> Any | None:
        if array.size == 1:
            return relax.const(array.reshape(()))
        shape = (1,) * (4 - array.ndim) + array.shape
        if array.ndim > 4 or shape != (1, channels, 1, 1):
            return None
        blocks = ceil(channels / self.lanes)
        return relax.const(per_channel(array.reshape(-1), blocks, self.lanes).reshape(1, blocks, 1, 1, self.lanes))

    def _plain_node(self, node: Node) -> None:
        value = substituted(node.expr, lambda var: self.values.as_plain(self.graph.resolve(var)))
        self.plain[node.var] = self.builder.emit(value)


def _channels(var: Any) -> int | None:
    """The channels of an (n, c, h, w) value; one channel that is spread over many is in one lane, not in all."""
    shape = static_shape(var)
    return shape[1] if len(shape) == 4 else None
