"""A torch ExportedProgram to TVM Relax, our integer operators and folded batch norms included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tvm
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from .compiler import CompileError
from .cpu.packing import bfloat16 as bfloat16_bits

# Each of these becomes one convolution or one matrix product in Relax.
_NAMES = "conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "bmm", "addmm", "qconv2d", "qlinear", "wlinear"
_PRODUCTS = frozenset(f"{name}.default" for name in (*_NAMES, "bconv2d", "blinear")) | {"conv2d.padding"}


@dataclass(frozen=True)
class Mark:
    """What a call of the external function `planish.NAME.NUMBER` stands for, until it is lowered to a kernel.

    What `quantize`, `qconv2d` and `qlinear` have in common for bytes and bfloat16 has one name; of `bfloat16` there is
    no scale.
    """

    op: str
    attributes: Mapping[str, Any]
    bfloat16: bool = False


@dataclass(frozen=True)
class Imported:
    """A Relax module whose calls of external functions are explained by `marks`.

    `sites` are the names of the torch modules that hold the convolutions and matrix products, in their order.
    """

    module: tvm.IRModule
    marks: Mapping[str, Mark]
    sites: tuple[str, ...]


def import_program(program: ExportedProgram) -> Imported:
    """Translates a program of static shapes.

    Raises:
        CompileError: an operation has no translation; it is named.
    """
    marks: dict[str, Mark] = {}
    tensors = _tensors(program)

    def marked(
        op: str, importer: Any, inputs: list[Any], node: torch.fx.Node, bfloat16: bool = False, **attributes: Any
    ) -> Any:
        name = f"planish.{op}.{len(marks)}"
        marks[name] = Mark(op, attributes, bfloat16)
        value = node.meta["val"]
        # TVM makes float32 of bfloat16; as whole numbers its bits pass.
        dtype = "uint16" if value.dtype == torch.bfloat16 else str(value.dtype).removeprefix("torch.")
        out = relax.TensorType(tuple(value.shape), dtype)
        return importer.block_builder.emit(relax.op.call_dps_packed(name, relax.Tuple(inputs), out))

    def quantize(node: Any, importer: Any) -> Any:
        x, scale, zero_point = node.args
        return marked("quantize", importer, [importer.env[x]], node, scale=float(scale), zero_point=int(zero_point))

    def qconv2d(node: Any, importer: Any) -> Any:
        x, weight, scale, bias, zero_point, stride, padding, dilation, groups = node.args
        return marked(
            "qconv2d",
            importer,
            [importer.env[x]],
            node,
            weight=tensors[weight.name],
            scale=tensors[scale.name],
            bias=tensors[bias.name],
            zero_point=int(zero_point),
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            groups=int(groups),
        )

    def qlinear(node: Any, importer: Any) -> Any:
        x, weight, scale, bias, zero_point = node.args
        return marked(
            "qlinear",
            importer,
            [importer.env[x]],
            node,
            weight=tensors[weight.name],
            scale=tensors[scale.name],
            bias=tensors[bias.name],
            zero_point=int(zero_point),
        )

    def wlinear(node: Any, importer: Any) -> Any:
        x, *rest = node.args
        weight, scale, bias = (tensors[value.name] for value in rest)
        return marked("wlinear", importer, [importer.env[x]], node, weight=weight, scale=scale, bias=bias)

    def bfloat16(node: Any, importer: Any) -> Any:
        return marked("quantize", importer, [importer.env[node.args[0]]], node, bfloat16=True)

    def bconv2d(node: Any, importer: Any) -> Any:
        x, weight, bias, stride, padding, dilation, groups = node.args
        return marked(
            "qconv2d",
            importer,
            [importer.env[x]],
            node,
            bfloat16=True,
            weight=bfloat16_bits(tensors[weight.name]),
            bias=tensors[bias.name],
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            groups=int(groups),
        )

    def blinear(node: Any, importer: Any) -> Any:
        x, weight, bias = node.args
        bits = bfloat16_bits(tensors[weight.name])
        inputs = [importer.env[x]]
        return marked("qlinear", importer, inputs, node, bfloat16=True, weight=bits, bias=tensors[bias.name])

    def activation(op: str) -> Callable[[Any, Any], Any]:
        return lambda node, importer: marked(op, importer, [importer.env[node.args[0]]], node)

    def batch_norm(node: Any, importer: Any) -> Any:
        # TVM's own translation of aten.batch_norm takes momentum for epsilon and assumes training; and as one factor
        # and one offset it folds into the convolution before it.
        x, weight, bias, mean, variance, training, _, epsilon, *_ = node.args
        if training or mean is None or variance is None:
            raise CompileError(f"{node.name} is a batch norm in training mode; call model.eval() before compiling")
        factor = 1.0 / np.sqrt(tensors[variance.name].astype(np.float64) + float(epsilon))
        if weight is not None:
            factor = factor * tensors[weight.name]
        offset = -tensors[mean.name] * factor
        if bias is not None:
            offset = offset + tensors[bias.name]
        shape = (-1,) + (1,) * (len(node.meta["val"].shape) - 2)
        factor, offset = (relax.const(a.astype(np.float32).reshape(shape)) for a in (factor, offset))
        scaled = importer.block_builder.emit(relax.op.multiply(importer.env[x], factor))
        return importer.block_builder.emit(relax.op.add(scaled, offset))

    def dropout(node: Any, importer: Any) -> Any:
        x, _, training = node.args
        if training:
            raise CompileError(f"{node.name} is a dropout in training mode; call model.eval() before compiling")
        return importer.env[x]

    def rsub(node: Any, importer: Any) -> Any:
        # TVM's own translation gives a whole number another type than the tensor's, and forgets alpha.
        x, other, *rest = node.args
        emit, dtype = importer.block_builder.emit, str(node.meta["val"].dtype).removeprefix("torch.")
        alpha = node.kwargs.get("alpha", rest[0] if rest else 1)
        value = importer.env[x] if alpha == 1 else emit(relax.op.multiply(importer.env[x], relax.const(alpha, dtype)))
        first = importer.env[other] if isinstance(other, torch.fx.Node) else relax.const(other, dtype)
        return emit(relax.op.subtract(first, value))

    def named_padding(node: Any, importer: Any) -> Any:
        defaults: tuple[Any, ...] = (None, None, None, 1, "valid", 1, 1)
        x, weight, bias, stride, padding, dilation, groups = tuple(node.args) + defaults[len(node.args) :]
        stride, dilation = (tuple(v) if isinstance(v, list | tuple) else (v, v) for v in (stride, dilation))
        size = node.args[1].meta["val"].shape[2:]
        frame = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, size, strict=True)]
        around = (frame[0] // 2, frame[1] // 2, frame[0] - frame[0] // 2, frame[1] - frame[1] // 2)
        emit, env = importer.block_builder.emit, importer.env
        value = emit(relax.op.nn.conv2d(env[x], env[weight], stride, around, dilation, groups, out_dtype="float32"))
        return value if bias is None else emit(relax.op.add(value, relax.op.reshape(env[bias], (1, -1, 1, 1))))

    def layer_norm(node: Any, importer: Any) -> Any:
        # TVM's own translation fails where the layer has no weights.
        defaults: tuple[Any, ...] = (None, (), None, None, 1e-5)
        x, shape, weight, bias, epsilon = (tuple(node.args) + defaults[len(node.args) :])[:5]
        fill = {"weight": np.ones(shape, np.float32), "bias": np.zeros(shape, np.float32)}
        given = {"weight": weight, "bias": bias}
        gamma, beta = (relax.const(fill[k]) if given[k] is None else importer.env[given[k]] for k in given)
        axes = list(range(-len(shape), 0))
        return importer.block_builder.emit(relax.op.nn.layer_norm(importer.env[x], gamma, beta, axes, float(epsilon)))

    def narrow(node: Any, importer: Any) -> Any:
        # TVM's own translation takes the length for the end.
        x, axis, start, length = node.args
        size = node.args[0].meta["val"].shape[axis]
        start = start + size if start < 0 else start
        return importer.block_builder.emit(relax.op.strided_slice(importer.env[x], [axis], [start], [start + length]))

    def select(node: Any, importer: Any) -> Any:
        # TVM's own translation passes an index from the end on, and reads before the tensor's beginning.
        x, axis, index = node.args
        place = relax.const(int(index) % int(x.meta["val"].shape[axis]), "int64")
        return importer.block_builder.emit(relax.op.take(importer.env[x], place, axis))

    converters = {
        "layer_norm.default": layer_norm,
        "narrow.default": narrow,
        "select.int": select,
        "quantize.default": quantize,
        "qconv2d.default": qconv2d,
        "qlinear.default": qlinear,
        "wlinear.default": wlinear,
        "bfloat16.default": bfloat16,
        "bconv2d.default": bconv2d,
        "blinear.default": blinear,
        "batch_norm.default": batch_norm,
        "conv2d.padding": named_padding,
        **dict.fromkeys(("dropout.default", "feature_dropout.default"), dropout),
        **dict.fromkeys(("rsub.Scalar", "rsub.Tensor"), rsub),
        **{f"{op}{suffix}.default": activation(op) for op in ("hardswish", "hardsigmoid") for suffix in ("", "_")},
    }
    _refuse_what_is_mistranslated(program)
    try:
        module = from_exported_program(
            program,
            unwrap_unit_return_tuple=True,
            custom_convert_map=converters,
            run_ep_decomposition=False,
        )
    except CompileError:
        raise
    except Exception as error:
        # TVM's importer raises assertions, key errors and its own errors alike, all of them for a model it cannot take.
        reason = str(error).strip().splitlines()
        raise CompileError(
            f"TVM cannot import the model: {reason[0] if reason else type(error).__name__}. "
            "Rewrite that operation with ones that TVM's torch frontend knows"
        ) from error
    return Imported(module, marks, _sites(program))


def _refuse_what_is_mistranslated(program: ExportedProgram) -> None:
    """TVM's translation ignores some arguments; the result would be another model."""
    for node in program.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0].rstrip("_")
        if name in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
            raise CompileError(f"{node.name} has an alpha, which TVM's torch frontend ignores; multiply")
        if name == "avg_pool2d" and len(node.args) > 6 and node.args[6] is not None:
            raise CompileError(f"{node.name} has a divisor_override, which TVM's torch frontend ignores; multiply")


def _sites(program: ExportedProgram) -> tuple[str, ...]:
    names = []
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _PRODUCTS:
            stack = node.meta.get("nn_module_stack") or {}
            names.append(str(list(stack.values())[-1][0]) if stack else "")
    return tuple(names)


def _tensors(program: ExportedProgram) -> dict[str, Any]:
    """Parameters, buffers and constants as arrays, by the name of their graph input."""
    found: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.target is None:
            continue
        source = program.state_dict if spec.target in program.state_dict else program.constants
        tensor = source[spec.target]
        if isinstance(tensor, torch.Tensor):
            found[spec.arg.name] = tensor.detach().cpu().numpy()
    return found
