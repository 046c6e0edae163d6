"""A Relax function as a list of nodes with their uses and constants, and which nodes fuse into one kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from .compiler import CompileError
from .cpu.convspec import EXPONENTIAL_STEPS, Step
from .cpu.epilogue import quantize_numbers
from .tvm_frontend import Imported, Mark

Array = NDArray[Any]

# Relax's elementwise operators that are steps of ours.
UNARY = {
    "relax.nn.relu": "relu",
    "relax.sigmoid": "sigmoid",
    "relax.nn.silu": "silu",
    "relax.tanh": "tanh",
    "relax.nn.gelu": "gelu",
    "relax.erf": "erf",
}
_MARKED_UNARY = ("hardswish", "hardsigmoid")
_PRODUCTS = ("relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d", "relax.matmul", "qconv2d", "qlinear", "wlinear")


@dataclass(frozen=True)
class Node:
    """One binding: `op` is Relax's name of the operator, or a mark's."""

    index: int
    var: Any
    expr: Any
    op: str
    args: tuple[Any, ...]
    mark: Mark | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The static shape of its value."""
        return static_shape(self.var)


@dataclass(frozen=True)
class ChainStep:
    """A step of an epilogue with what it reads: an array or another node's value.

    The array has a value a channel, or holds the numbers of `quantize`.
    """

    step: Step
    array: Array | None = None
    operand: Any | None = None


@dataclass
class Chain:
    """A convolution or dense node with the elementwise nodes after it that its kernel computes too."""

    head: Node
    last: Node
    steps: list[ChainStep] = field(default_factory=list)


class Graph:
    """The nodes of `main` in order; constants are followed through reshapes and transpositions."""

    def __init__(self, imported: Imported) -> None:
        function = imported.module["main"]
        if len(function.body.blocks) != 1:
            raise CompileError("the model has control flow; Planish compiles straight-line programs")
        self.params: list[Any] = list(function.params)
        self.output: Any = function.body.body
        self.nodes: list[Node] = []
        self.constants: dict[Any, Array] = {}
        self.users: dict[Any, list[Node]] = defaultdict(list)
        # Zeros around the input of a convolution beside those of its own, by its index (see `tvm_padding`).
        self.framing: dict[int, tuple[int, int, int, int]] = {}
        self._aliases: dict[Any, Any] = {}
        for binding in function.body.blocks[0].bindings:
            self._add(binding.var, binding.value, imported.marks)
        self.output = self.resolve(self.output)
        products = [node for node in self.nodes if node.op in _PRODUCTS]
        # Where an operator was translated into more than one product the names would be wrong: then there are none.
        whole = len(products) == len(imported.sites)
        self.sites = {n.index: site for n, site in zip(products, imported.sites, strict=True)} if whole else {}

    @cached_property
    def weight_count(self) -> int:
        """The number of weights of all convolutions and dense layers."""
        total = 0
        for node in self.nodes:
            if node.op in _PRODUCTS:
                weight = node.mark.attributes["weight"] if node.mark else self.array(node.args[1])
                total += weight.size if weight is not None else 0
        return total

    @cached_property
    def producers(self) -> dict[Any, Node]:
        """The node that computes a variable."""
        return {node.var: node for node in self.nodes}

    def resolve(self, var: Any) -> Any:
        """The variable that this one only renames."""
        while var in self._aliases:
            var = self._aliases[var]
        return var

    def array(self, expr: Any) -> Array | None:
        """The constant's value, or None for what is computed."""
        if isinstance(expr, relax.Var):
            return self.constants.get(self.resolve(expr))
        value = getattr(expr, "value", None)
        return value.numpy() if value is not None and hasattr(value, "numpy") else None

    def single_user(self, var: Any) -> Node | None:
        """The only reader of a value that is no output, else None."""
        users = self.users[var]
        if len(users) != 1 or users[0].op == "tuple" or var.same_as(self.output):
            return None
        return users[0] if sum(1 for arg in users[0].args if same(arg, var)) == 1 else None

    def bypass(self, node: Node) -> None:
        """Drops a node: what reads it reads its first argument instead."""
        source = node.args[0]
        new = {
            user.index: replace(user, args=tuple(source if same(arg, node.var) else arg for arg in user.args))
            for user in self.users.pop(node.var)
        }
        self.nodes = [new.get(other.index, other) for other in self.nodes if other is not node]
        for var, users in self.users.items():
            self.users[var] = [new.get(user.index, user) for user in users if user is not node]
        readers = {user.index: user for user in (*self.users[source], *new.values())}
        self.users[source] = [readers[index] for index in sorted(readers)]
        self.__dict__.pop("producers", None)  # they are told anew

    def _add(self, var: Any, expr: Any, marks: Mapping[str, Mark]) -> None:
        if isinstance(expr, relax.Var):
            self._aliases[var] = self.resolve(expr)
            return
        mark = None
        if isinstance(expr, relax.Tuple):
            op, args = "tuple", tuple(expr.fields)
        elif isinstance(expr, relax.Call):
            op, args = getattr(expr.op, "name", str(expr.op)), tuple(expr.args)
            if op == "relax.call_dps_packed":
                mark = marks.get(str(expr.args[0].global_symbol))
                if mark is not None:
                    op, args = mark.op, tuple(expr.args[1].fields)
        else:
            op, args = type(expr).__name__, (getattr(expr, "tuple_value", None),)
        folded = self._folded(op, expr, args)
        if folded is not None:
            self.constants[var] = folded
            return
        flat: list[Any] = []
        for arg in args:
            flat.extend(arg.fields if isinstance(arg, relax.Tuple) else [arg])
        resolved = tuple(self.resolve(arg) if isinstance(arg, relax.Var) else arg for arg in flat)
        node = Node(len(self.nodes), var, expr, op, resolved, mark)
        self.nodes.append(node)
        for arg in {id(a): a for a in resolved if isinstance(a, relax.Var)}.values():
            if not any(user is node for user in self.users[arg]):
                self.users[arg].append(node)

    def _folded(self, op: str, expr: Any, args: Sequence[Any]) -> Array | None:
        if op not in ("relax.reshape", "relax.permute_dims", "relax.expand_dims"):
            return None
        source = self.array(args[0])
        if source is None:
            return None
        if op == "relax.permute_dims":
            axes = expr.attrs.axes
            return np.ascontiguousarray(source.transpose(None if axes is None else [int(a) for a in axes]))
        return source.reshape(tuple(int(v) for v in expr.ty.shape))


def static_shape(expr: Any) -> tuple[int, ...]:
    """The shape of a tensor expression.

    Raises:
        CompileError: a dimension is symbolic.
    """
    try:
        return tuple(int(v) for v in expr.ty.shape)
    except (TypeError, AttributeError) as error:
        raise CompileError(f"{expr} has no static tensor shape; export the model with fixed shapes") from error


def same(a: Any, b: Any) -> bool:
    """Whether two expressions are the same variable."""
    return isinstance(a, relax.Var) and isinstance(b, relax.Var) and bool(a.same_as(b))


def chains(graph: Graph) -> dict[int, Chain]:
    """The fused kernels by the index of their head; no node is in two of them.

    Later heads choose first: of two convolutions that meet in an addition the later one computes it, and the other's
    result is read as the residual.
    """
    taken: set[int] = set()
    found: dict[int, Chain] = {}
    for node in reversed(graph.nodes):
        if is_head(graph, node):
            chain = _grow(graph, node, taken)
            taken.update(range_of(graph, chain))
            found[node.index] = chain
    return found


def range_of(graph: Graph, chain: Chain) -> list[int]:
    """The indices of the nodes that a chain computes after its head."""
    indices, var = [], chain.head.var
    while not same(var, chain.last.var):
        user = graph.users[var][0]
        indices.append(user.index)
        var = user.var
    return indices


def is_head(graph: Graph, node: Node) -> bool:
    """Whether one of our kernels can compute this node."""
    if node.op in ("qconv2d", "qlinear", "wlinear"):
        return True
    if node.op == "relax.nn.conv2d":
        weight = graph.array(node.args[1])
        return weight is not None and len(node.shape) == 4 and str(weight.dtype) == "float32"
    if node.op == "relax.matmul":
        weight = graph.array(node.args[1])
        return weight is not None and weight.ndim == 2 and str(weight.dtype) == "float32"
    return False


def channel_axis(node: Node) -> int:
    """Which axis of a head's result are its channels: 1 of a convolution's, the last of a dense layer's."""
    return 1 if node.op in ("qconv2d", "relax.nn.conv2d") else len(node.shape) - 1


def _grow(graph: Graph, head: Node, taken: set[int]) -> Chain:
    chain = Chain(head, head)
    while True:
        user = graph.single_user(chain.last.var)
        if user is None or user.index in taken:
            return chain
        step = _as_step(graph, head, chain.last.var, user)
        if step is None or user.shape != head.shape:
            return chain
        if step.step.op in EXPONENTIAL_STEPS and any(s.step.op in EXPONENTIAL_STEPS for s in chain.steps):
            return chain
        chain.steps.append(step)
        chain.last = user
        if step.step.op in ("quantize", "bfloat16"):
            return chain


def _as_step(graph: Graph, head: Node, var: Any, user: Node) -> ChainStep | None:
    if user.op in UNARY:
        return ChainStep(Step(UNARY[user.op]))
    if user.op in _MARKED_UNARY:
        return ChainStep(Step(user.op))
    if user.op == "quantize" and user.mark is not None:
        attributes = user.mark.attributes
        if user.mark.bfloat16:
            return ChainStep(Step("bfloat16"))
        return ChainStep(Step("quantize"), array=quantize_numbers(attributes["scale"], attributes["zero_point"]))
    if user.op in ("relax.clip", "relax.nn.relu6"):
        bounds = (0.0, 6.0) if user.op == "relax.nn.relu6" else tuple(float(_number(a)) for a in user.args[1:3])
        return ChainStep(Step("clip", bounds))
    if user.op not in ("relax.add", "relax.multiply", "relax.subtract", "relax.divide"):
        return None
    first = same(user.args[0], var)
    other = user.args[1] if first else user.args[0]
    array = graph.array(other)
    if array is not None:
        return _affine(head, user.op, array, first)
    if user.op not in ("relax.add", "relax.multiply"):
        return None
    if static_shape(other) != head.shape or str(other.ty.dtype) != "float32":
        return None
    return ChainStep(Step("add" if user.op == "relax.add" else "mul"), operand=other)


def _affine(head: Node, op: str, array: Array, first: bool) -> ChainStep | None:
    """`value op array` as one factor or offset a channel, where the array varies along the channels only."""
    axis, rank = channel_axis(head), len(head.shape)
    channels = head.shape[axis]
    shape = (1,) * (rank - array.ndim) + array.shape
    if len(shape) != rank or any(size != 1 for i, size in enumerate(shape) if i != axis):
        return None
    values = np.broadcast_to(array.reshape(-1).astype(np.float64), (channels,)).copy()
    if op == "relax.add":
        return ChainStep(Step("bias"), array=values)
    if op == "relax.multiply":
        return ChainStep(Step("scale"), array=values)
    if not first:  # array - value and array / value are no steps
        return None
    if op == "relax.subtract":
        return ChainStep(Step("bias"), array=-values)
    return ChainStep(Step("scale"), array=1 / values)


def _number(expr: Any) -> float:
    return float(getattr(expr, "value", expr))
