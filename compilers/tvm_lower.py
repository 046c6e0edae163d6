"""A Relax graph to calls of scheduled CPU kernels on blocked tensors; what has none stays in Relax for the fallback.

Every value may exist plain (as torch has it) and blocked (n, C/lanes, h, w, lanes); the other form is made where a
reader needs it, once. So a chain of convolutions, additions and activations stays blocked from end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import tvm
from tvm import relax, te
from tvm.relax.expr_functor import PyExprMutator, mutator

from .cpu.conv import activation, convolution, quantized
from .cpu.convspec import ConvSpec, Step, choose_tile
from .cpu.dense import DenseSpec, dense
from .cpu.packing import dense_float, dense_int8, per_channel, weight_depthwise, weight_float, weight_int8
from .cpu.pool import PoolSpec, global_mean, pool
from .tvm_graph import Array, Chain, ChainStep, Graph, Node, chains, range_of, static_shape

# Elementwise operators that keep a lane of zeros finite, so they may run on blocked tensors with unused lanes.
_BLOCKED_ELEMENTWISE = {
    "relax.nn.relu",
    "relax.nn.relu6",
    "relax.clip",
    "relax.sigmoid",
    "relax.nn.silu",
    "relax.tanh",
    "relax.nn.gelu",
    "relax.add",
    "relax.subtract",
    "relax.multiply",
}
# From here on a second thread gains more than it costs to wake it (about 5 us).
_PARALLEL_MACS = 1_000_000


@dataclass(frozen=True)
class CpuTarget:
    """What the kernels need to know of the CPU: float32 lanes and registers of a vector, VNNI, threads."""

    lanes: int
    registers: int
    vnni: bool
    threads: int


def lower(graph: Graph, target: CpuTarget) -> tuple[tvm.IRModule, list[tuple[str, str]]]:
    """The module with `main` and the kernels it calls; and (kernel, site) of every call of a kernel, in order."""
    lowering = _Lowering(graph, target)
    return lowering.run(), lowering.calls


class _Lowering:
    def __init__(self, graph: Graph, target: CpuTarget) -> None:
        self.graph = graph
        self.target = target
        self.lanes = target.lanes
        self.builder = relax.BlockBuilder()
        self.plain: dict[Any, Any] = {}
        self.blocked: dict[Any, Any] = {}
        self.kernels: dict[object, Any] = {}
        self.calls: list[tuple[str, str]] = []
        self.chains = chains(graph)
        self.inside = {i: chain for chain in self.chains.values() for i in range_of(graph, chain)}

    def run(self) -> tvm.IRModule:
        params = [relax.Var(p.name, p.ty) for p in self.graph.params]
        with self.builder.function("main", params):
            for old, new in zip(self.graph.params, params, strict=True):
                self.plain[old] = new
            with self.builder.dataflow():
                for node in self.graph.nodes:
                    self._node(node)
                result = self.builder.emit_output(self._as_plain(self.graph.output))
            self.builder.emit_func_output(result)
        return self.builder.get()

    def _node(self, node: Node) -> None:
        chain = self.chains.get(node.index) or self.inside.get(node.index)
        if chain is not None:
            if node.index == chain.last.index:
                self._chain(chain)
            return
        if node.op == "quantize":
            if all(user.op in ("qconv2d", "qlinear") for user in self.graph.users[node.var]):
                return  # its readers quantise where they pad
            attributes = node.mark.attributes  # type: ignore[union-attr]
            self.plain[node.var] = self._elementwise(
                self._as_plain(node.args[0]),
                lambda v: quantized(v, attributes["scale"], attributes["zero_point"]),
                "quantize",
            )
        elif node.mark is not None:
            self._activation(node)
        elif not (self._pooling(node) or self._blocked_node(node)):
            self._plain_node(node)

    # -- kernels of our own -------------------------------------------------------------------------------------------

    def _chain(self, chain: Chain) -> None:
        if chain.head.op in ("relax.nn.conv2d", "qconv2d"):
            self._convolution(chain)
        else:
            self._dense(chain)

    def _convolution(self, chain: Chain) -> None:
        head, int8 = chain.head, chain.head.op == "qconv2d"
        source, quantize = self._quantized_source(head.args[0]) if int8 else (head.args[0], None)
        n, c, h, w = static_shape(source)
        steps = list(chain.steps)
        if int8:
            attributes = head.mark.attributes  # type: ignore[union-attr]
            weight, groups, zero_point = attributes["weight"], attributes["groups"], attributes["zero_point"]
            stride, dilation = attributes["stride"], attributes["dilation"]
            top, left = attributes["padding"]
            padding = (top, left, top, left)
            steps = [
                ChainStep(Step("scale"), array=attributes["scale"].astype(np.float64)),
                ChainStep(Step("bias"), array=attributes["bias"].astype(np.float64)),
                *steps,
            ]
        else:
            weight, groups, zero_point = self.graph.array(head.args[1]), int(head.expr.attrs.groups), 0
            stride, dilation = _pair(head.expr.attrs.strides), _pair(head.expr.attrs.dilation)
            padding = _frame(head.expr.attrs.padding)
        assert weight is not None
        o = weight.shape[0]
        depthwise = groups == c == o and groups > 1
        if not depthwise and groups > 1:
            weight, groups = _merge_groups(weight, groups, c, self.lanes)
        affine, rest = _leading_affine(steps, o)
        if not int8:
            weight = weight * affine[0].reshape(-1, 1, 1, 1)
        plain = not depthwise and c < self.lanes and source not in self.blocked
        in_lanes = (ceil(c / 4) * 4 if int8 else 1) if plain else self.lanes
        plain = in_lanes != self.lanes
        arrays = ([("scale", affine[0])] if int8 else []) + [("bias", affine[1])]
        if not int8 and not affine[1].any():
            arrays = []
        spec = ConvSpec(
            n=n, c=c, h=h, w=w, o=o, kernel=(weight.shape[2], weight.shape[3]), stride=stride, padding=padding,
            dilation=dilation, groups=1 if depthwise else groups, lanes=self.lanes, in_lanes=in_lanes,
            depthwise=depthwise, int8=int8, zero_point=zero_point, quantize=quantize,
            steps=(*(Step(name) for name, _ in arrays), *(step.step for step in rest)),
            threads=1,
        )  # fmt: skip
        if self.target.threads > 1 and spec.macs >= _PARALLEL_MACS:
            spec = _with_threads(spec, self.target.threads)
        data = self._as_plain(source) if plain else self._as_blocked(source)
        arguments = [data, *_conv_weights(spec, weight)]
        arguments += [relax.const(per_channel(values, spec.out_blocks, self.lanes)) for _, values in arrays]
        arguments += self._step_arguments(rest, spec.out_blocks)
        kernel = self._kernel(
            spec,
            lambda: convolution(spec, choose_tile(spec, self.target.registers), vnni=self.target.vnni),
            _conv_name(spec),
        )
        out = relax.TensorType((n, spec.out_blocks, spec.oh, spec.ow, self.lanes), spec.out_dtype)
        self.blocked[chain.last.var] = self._call(kernel, arguments, out, head)

    def _dense(self, chain: Chain) -> None:
        head, int8 = chain.head, chain.head.op == "qlinear"
        source, quantize = self._quantized_source(head.args[0]) if int8 else (head.args[0], None)
        shape = static_shape(source)
        steps = list(chain.steps)
        zero_point = 0
        if int8:
            attributes = head.mark.attributes  # type: ignore[union-attr]
            weight, zero_point = attributes["weight"], attributes["zero_point"]
            steps = [
                ChainStep(Step("scale"), array=attributes["scale"].astype(np.float64)),
                ChainStep(Step("bias"), array=attributes["bias"].astype(np.float64)),
                *steps,
            ]
        else:
            matrix = self.graph.array(head.args[1])
            assert matrix is not None
            weight = matrix.T
        o, k = weight.shape
        affine, rest = _leading_affine(steps, o)
        if not int8:
            weight = weight * affine[0].reshape(-1, 1)
        arrays = ([("scale", affine[0])] if int8 else []) + [("bias", affine[1])]
        m = int(np.prod(shape[:-1]))
        spec = DenseSpec(
            m=m, k=k, o=o, lanes=self.lanes, int8=int8, zero_point=zero_point, quantize=quantize,
            steps=(*(Step(name) for name, _ in arrays), *(step.step for step in rest)),
            threads=self.target.threads if m * k * o >= _PARALLEL_MACS else 1,
        )  # fmt: skip
        data = self._as_plain(source)
        if len(shape) != 2:
            data = self.builder.emit(relax.op.reshape(data, (m, k)))
        arguments = [data, *(dense_int8(weight, zero_point, self.lanes) if int8 else [dense_float(weight, self.lanes)])]
        arguments = [arguments[0], *(relax.const(a) for a in arguments[1:])]
        arguments += [relax.const(per_channel(values, spec.out_blocks, self.lanes)) for _, values in arrays]
        arguments += self._step_arguments(rest, spec.out_blocks)
        name = f"{'q' if int8 else ''}dense_{m}x{k}_{o}"
        kernel = self._kernel(spec, lambda: dense(spec, vnni=self.target.vnni), name)
        dtype = "uint8" if any(step.op == "quantize" for step in spec.steps) else "float32"
        value = self._call(kernel, arguments, relax.TensorType((m, o), dtype), head)
        if len(shape) != 2:
            value = self.builder.emit(relax.op.reshape(value, (*shape[:-1], o)))
        self.plain[chain.last.var] = value

    def _step_arguments(self, steps: list[ChainStep], blocks: int) -> list[Any]:
        arguments = []
        for step in steps:
            if step.array is not None:
                arguments.append(relax.const(per_channel(step.array, blocks, self.lanes)))
            elif step.operand is not None:
                arguments.append(self._as_blocked(step.operand))
        return arguments

    def _quantized_source(self, var: Any) -> tuple[Any, tuple[float, int] | None]:
        """What an int8 kernel reads: bytes that exist already, or the floats and how to quantise them."""
        if var in self.blocked or var in self.plain:
            return var, None
        producer = next(node for node in self.graph.nodes if node.var.same_as(var))
        attributes = producer.mark.attributes  # type: ignore[union-attr]
        return producer.args[0], (attributes["scale"], attributes["zero_point"])

    def _pooling(self, node: Node) -> bool:
        if node.op == "relax.mean" and len(static_shape(node.args[0])) == 4:
            axes = sorted(int(a) % 4 for a in node.expr.attrs.axis or ())
            if axes != [2, 3] or node.args[0] not in self.blocked:
                return False
            n, c, h, w = static_shape(node.args[0])
            kernel = self._kernel(
                ("mean", n, c, h, w), lambda: global_mean(n, c, h, w, self.lanes), f"mean_{c}x{h}x{w}"
            )
            value = self._call(kernel, [self.blocked[node.args[0]]], relax.TensorType((n, c), "float32"), node)
            keep = bool(node.expr.attrs.keepdims)
            self.plain[node.var] = self.builder.emit(relax.op.reshape(value, (n, c, 1, 1))) if keep else value
            return True
        if node.op not in ("relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.nn.adaptive_avg_pool2d"):
            return False
        if str(node.args[0].ty.dtype) != "float32" or len(node.shape) != 4:
            return False
        n, c, h, w = static_shape(node.args[0])
        attrs, out = node.expr.attrs, node.shape[2:]
        if node.op == "relax.nn.adaptive_avg_pool2d":
            if h % out[0] or w % out[1]:
                return False
            kernel_size = stride = (h // out[0], w // out[1])
            padding, include = (0, 0, 0, 0), True
        else:
            if any(int(d) != 1 for d in attrs.dilation):
                return False
            kernel_size, stride = _pair(attrs.pool_size), _pair(attrs.strides)
            padding = _frame(attrs.padding)
            # A window that ceil_mode hangs over the edge counts neither way in torch: leave that to the fallback.
            include = bool(attrs.count_include_pad)
            if node.op == "relax.nn.avg_pool2d" and bool(attrs.ceil_mode):
                return False
        spec = PoolSpec(
            n, ceil(c / self.lanes), h, w, kernel_size, stride, padding, (out[0], out[1]),
            node.op == "relax.nn.max_pool2d", include, self.lanes,
            self.target.threads if n * c * h * w > 300_000 else 1,
        )  # fmt: skip
        kernel = self._kernel(spec, lambda: pool(spec), f"pool_{c}x{h}x{w}")
        shape = relax.TensorType((n, spec.blocks, *out, self.lanes), "float32")
        self.blocked[node.var] = self._call(kernel, [self._as_blocked(node.args[0])], shape, node)
        return True

    def _activation(self, node: Node) -> None:
        source = node.args[0]
        step = Step(node.op)
        forms = self.blocked if source in self.blocked else self.plain
        form = self.blocked[source] if source in self.blocked else self._as_plain(source)
        forms[node.var] = self._elementwise(form, lambda v: activation(step, v), node.op)

    # -- Relax operators ----------------------------------------------------------------------------------------------

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
        rewritten = _Substitute(self._as_plain, self.graph).visit_expr(node.expr)
        self.plain[node.var] = self.builder.emit(rewritten)

    # -- forms of a value ---------------------------------------------------------------------------------------------

    def _as_plain(self, var: Any) -> Any:
        if var in self.plain:
            return self.plain[var]
        if var in self.graph.constants:
            self.plain[var] = relax.const(self.graph.constants[var])
            return self.plain[var]
        n, c, h, w = static_shape(var)
        lanes = self.lanes
        self.plain[var] = self.builder.emit_te(
            lambda a: te.compute(
                (n, c, h, w),
                lambda m, o, y, x: a[m, te.indexdiv(o, lanes), y, x, te.indexmod(o, lanes)],
                name="unpack",
            ),
            self.blocked[var],
            primfunc_name_hint="unpack",
        )
        return self.plain[var]

    def _as_blocked(self, var: Any) -> Any:
        if var in self.blocked:
            return self.blocked[var]
        n, c, h, w = static_shape(var)
        lanes, blocks = self.lanes, ceil(c / self.lanes)
        source = self._as_plain(var)
        zero = tvm.tirx.const(0, str(var.ty.dtype))

        def value(a: Any, m: Any, b: Any, y: Any, x: Any, i: Any) -> Any:
            inside = a[m, b * lanes + i, y, x]
            return inside if c % lanes == 0 else te.if_then_else(b * lanes + i < c, inside, zero)

        self.blocked[var] = self.builder.emit_te(
            lambda a: te.compute((n, blocks, h, w, lanes), lambda m, b, y, x, i: value(a, m, b, y, x, i), name="pack"),
            source,
            primfunc_name_hint="pack",
        )
        return self.blocked[var]

    def _elementwise(self, value: Any, function: Callable[[Any], Any], name: str) -> Any:
        shape = static_shape(value)
        return self.builder.emit_te(
            lambda a: te.compute(shape, lambda *indices: function(a(*indices)), name=name),
            value,
            primfunc_name_hint=name,
        )

    def _call(self, kernel: Any, arguments: list[Any], out: Any, node: Node) -> Any:
        self.calls.append((str(kernel.name_hint), self.graph.sites.get(node.index, "")))
        return self.builder.emit(relax.call_tir(kernel, arguments, out))

    def _kernel(self, key: object, build: Callable[[], Any], name: str) -> Any:
        if key not in self.kernels:
            # The pattern "opaque" keeps the fusion passes and the fallback schedule away from it.
            function = build().without_attr("global_symbol").with_attr({"op_pattern": 8, "planish.scheduled": 1})
            self.kernels[key] = self.builder.add_func(function, name)
        return self.kernels[key]


@mutator
class _Substitute(PyExprMutator):  # type: ignore[misc]
    """Replaces variables by their plain forms and folded constants by their values."""

    def __init__(self, plain: Callable[[Any], Any], graph: Graph) -> None:
        super().__init__()
        self.plain = plain
        self.graph = graph

    def visit_var_(self, op: Any) -> Any:
        return self.plain(self.graph.resolve(op))

    def visit_dataflow_var_(self, op: Any) -> Any:
        return self.plain(self.graph.resolve(op))


def _channels(var: Any) -> int | None:
    """The channels of an (n, c, h, w) value; one channel that is spread over many is in one lane, not in all."""
    shape = static_shape(var)
    return shape[1] if len(shape) == 4 else None


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(v) for v in values)
    return first, second


def _frame(values: Any) -> tuple[int, int, int, int]:
    top, left, bottom, right = (int(v) for v in values)
    return top, left, bottom, right


def _with_threads(spec: ConvSpec, threads: int) -> ConvSpec:
    from dataclasses import replace

    return replace(spec, threads=threads)


def _leading_affine(steps: list[ChainStep], channels: int) -> tuple[tuple[Array, Array], list[ChainStep]]:
    """Factor and offset a channel of the affine steps at the start, and the steps that are left."""
    scale, bias = np.ones(channels), np.zeros(channels)
    for position, step in enumerate(steps):
        if step.array is None:
            return (scale, bias), steps[position:]
        if step.step.op == "scale":
            scale, bias = scale * step.array, bias * step.array
        else:
            bias = bias + step.array
    return (scale, bias), []


def _merge_groups(weight: Array, groups: int, c: int, lanes: int) -> tuple[Array, int]:
    """Joins groups, filling with zeros, until each has whole blocks of input and output channels."""
    o, per_group = weight.shape[0], weight.shape[1]
    merged = next(
        (g for g in range(groups, 0, -1) if groups % g == 0 and (c // g) % lanes == 0 and (o // g) % lanes == 0), 1
    )
    if merged == groups:
        return weight, groups
    joined = groups // merged
    out = np.zeros((o, per_group * joined, *weight.shape[2:]), weight.dtype)
    rows = o // groups
    for group in range(groups):
        inside = group % joined
        out[group * rows : (group + 1) * rows, inside * per_group : (inside + 1) * per_group] = weight[
            group * rows : (group + 1) * rows
        ]
    return out, merged


def _conv_weights(spec: ConvSpec, weight: Array) -> list[Any]:
    if spec.depthwise:
        return [relax.const(weight_depthwise(weight, spec.lanes))]
    if spec.int8:
        return [relax.const(a) for a in weight_int8(spec, weight)]
    return [relax.const(weight_float(spec, weight))]


def _conv_name(spec: ConvSpec) -> str:
    kind = ("q" if spec.int8 else "") + ("depthwise" if spec.depthwise else "conv")
    kernel = "x".join(str(k) for k in spec.kernel)
    tail = "_".join(step.op for step in spec.steps if step.op not in ("scale", "bias"))
    name = f"{kind}{kernel}_{spec.c}x{spec.h}x{spec.w}_{spec.o}_s{spec.stride[0]}"
    return f"{name}_{tail}" if tail else name
