"""The values of a module that is being lowered, in the forms that exist of them, and the kernels that it calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import tvm
from tvm import relax, te

from .cpu.convspec import ConvSpec
from .cpu.epilogue import quantize_numbers, quantized
from .cpu.functions import bfloat16
from .cpu.machine import Machine
from .cpu.packing import per_channel
from .cpu.tiles import Choice
from .kernel_store import kernel_key
from .tvm_graph import ChainStep, Graph, Node, static_shape


@dataclass(frozen=True)
class Kernel:
    """A kernel that is called: its symbol, what it computes and how, the key of its code, what writes its function."""

    symbol: str
    subject: object
    key: str
    build: Callable[[], Any]


def function_kernel(function: Any, symbol: str, context: object) -> Kernel:
    """A function that stands in a module as a kernel; its text is its key."""
    plain = function.without_attr("global_symbol") if function.attrs and "global_symbol" in function.attrs else function
    text = _without_names(plain.script())
    # TVM numbers what it fuses within a module; the same function has another number in the next one.
    name = re.sub(r"\d+", "", symbol)[:80]
    return named_kernel(name, ("function", name, text), text, context, lambda: plain)


def named_kernel(name: str, subject: object, key: object, context: object, build: Callable[[], Any]) -> Kernel:
    """A kernel whose symbol begins with a name, which stands in its code: two names never share one in the store."""
    digest = kernel_key(context, name, key)
    return Kernel(f"{name}_{digest[:10]}", subject, digest, build)


def _without_names(text: str) -> str:
    """The text of a function with its parameters numbered: TVM names them by where in a module the function is."""
    _, _, signature = text.partition("def main(")
    names = re.findall(r"(?:^|, )(\w+): T\.", signature.partition("):")[0])
    places = {name: f"p{place}" for place, name in enumerate(dict.fromkeys(names))}
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda found: places.get(found[0], found[0]), text)


class Values:
    """Every value plain (as torch has it), blocked (n, C/lanes, h, w, lanes), or both.

    Attributes:
        builder: Of the module.
        plain: The plain form of the graph's variables that have one; `blocked` likewise.
        calls: (kernel, site) of every call of a kernel, in order.
    """

    def __init__(self, graph: Graph, target: Machine, context: object = None, beside: Values | None = None) -> None:
        """Starts with no values; the caller adds the parameters to `plain`.

        Args:
            graph: What is lowered.
            target: The CPU.
            context: What beside its key decides about a kernel's code: target and versions.
            beside: Another function's, in whose module this one's is, with the same kernels.
        """
        self.graph = graph
        self.target = target
        self.lanes = target.lanes
        self.builder: Any = beside.builder if beside else relax.BlockBuilder()
        self.plain: dict[Any, Any] = {}
        self.blocked: dict[Any, Any] = {}
        self.calls: list[tuple[str, str]] = []
        # Every convolution, how it is computed, and the largest sum of its weights.
        self.convolutions: dict[ConvSpec, tuple[Choice, int]] = beside.convolutions if beside else {}
        self._kernels: dict[object, Kernel] = beside._kernels if beside else {}
        self._context = context

    def as_plain(self, var: Any) -> Any:
        """The plain form of a variable of the graph; made from the blocked one where only that exists."""
        if var in self.plain:
            return self.plain[var]
        array = self.graph.array(var)
        if array is not None:
            self.plain[var] = relax.const(array)
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

    def as_blocked(self, var: Any) -> Any:
        """The blocked form of an (n, c, h, w) variable; unused lanes of a form that is made here are zero."""
        if var in self.blocked:
            return self.blocked[var]
        n, c, h, w = static_shape(var)
        lanes, blocks = self.lanes, ceil(c / self.lanes)
        source = self.as_plain(var)
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

    def blocked_type(self, var: Any) -> Any:
        """The type of the blocked form of an (n, c, h, w) variable."""
        n, c, h, w = static_shape(var)
        return relax.TensorType((n, ceil(c / self.lanes), h, w, self.lanes), str(var.ty.dtype))

    def elementwise(self, value: Any, function: Callable[[Any], Any], name: str, *, fuse: bool = True) -> Any:
        """Emits a function of every element of a value, which fuses with its neighbours unless it must not."""
        shape = static_shape(value)

        def compute(a: Any) -> Any:
            return te.compute(shape, lambda *indices: function(a(*indices)), name=name)

        if fuse:
            return self.builder.emit_te(compute, value, primfunc_name_hint=name)
        data = te.placeholder(shape, str(value.ty.dtype), name="data")
        kernel = te.create_prim_func([data, compute(data)]).without_attr("global_symbol").with_attr("op_pattern", 8)
        return self.builder.emit(relax.call_tir(self.builder.add_func(kernel, name), [value], value.ty))

    def bfloat16(self, value: Any) -> Any:
        """The bfloat16 numbers of a float value."""
        return self.elementwise(value, bfloat16, "bfloat16")

    def quantized(self, value: Any, scale: float, zero_point: int) -> Any:
        """The bytes of a float value."""
        factor, zero = (tvm.tirx.const(float(number), "float32") for number in quantize_numbers(scale, zero_point))
        return self.elementwise(value, lambda v: quantized(v * factor, zero), "quantize")

    def reshaped(self, value: Any, shape: tuple[int, ...]) -> Any:
        """The same values in another shape; nothing is copied."""
        return value if static_shape(value) == shape else self.builder.emit(relax.op.reshape(value, shape))

    def call(self, kernel: str, arguments: list[Any], out: Any, node: Node) -> Any:
        """Emits the call of a kernel for a node of the graph; `out` is the type of its result."""
        self.calls.append((kernel, self.graph.sites.get(node.index, "")))
        return self.builder.emit(relax.op.call_dps_packed(kernel, relax.Tuple(arguments), out))

    def kernel(self, key: object, build: Callable[[], Any], name: str) -> str:
        """The symbol of the kernel of that key, which `build` writes where its code is not at hand.

        The key's `repr` must hold everything that decides about the code.
        """
        if key not in self._kernels:
            self._kernels[key] = named_kernel(name, key, key, self._context, build)
        return self._kernels[key].symbol

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels that are called."""
        return list(self._kernels.values())

    def step_arguments(self, steps: list[ChainStep], blocks: int) -> list[Any]:
        """What the steps after a kernel read: constants by channel, and blocked operands."""
        arguments = []
        for step in steps:
            if step.step.op == "quantize":
                arguments.append(relax.const(step.array))
            elif step.array is not None:
                arguments.append(relax.const(per_channel(step.array, blocks, self.lanes)))
            elif step.operand is not None:
                arguments.append(self.as_blocked(step.operand))
        return arguments

    def quantized_source(self, var: Any) -> tuple[Any, bool]:
        """What a kernel of bytes or bfloat16 reads: those that exist already, or the floats, which it must convert."""
        if var in self.blocked or var in self.plain:
            return var, False
        return self._producer(var).args[0], True

    def quantizer(self, var: Any) -> tuple[float, int]:
        """Scale and zero point of a quantised variable."""
        attributes = self._producer(var).mark.attributes  # type: ignore[union-attr]
        return attributes["scale"], attributes["zero_point"]

    def _producer(self, var: Any) -> Node:
        return self.graph.producers[var]
