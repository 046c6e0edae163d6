"""Layer norm, softmax and attention to calls of our kernels."""

from __future__ import annotations

from dataclasses import replace
from math import prod, sqrt
from typing import Any

import numpy as np
from tvm import relax

from .cpu.attention import AttentionSpec, attention
from .cpu.rows import RowSpec, rows
from .tvm_graph import Node, static_shape
from .tvm_values import Values
from .tvm_views import in_place

# From here on a second thread gains more than it costs to wake it (measured: of 300 000 values it still lost).
_PARALLEL_VALUES = 200000
_PARALLEL_MACS = 1_000_000


def lower_rows(values: Values, node: Node) -> bool:
    """Emits the call of the kernel that computes a node; False where none of these kernels does."""
    if node.op == "relax.nn.attention":
        return _attention(values, node)
    if node.op not in ("relax.nn.layer_norm", "relax.nn.softmax") or str(node.var.ty.dtype) != "float32":
        return False
    shape, attrs = node.shape, node.expr.attrs
    axes = [int(a) % len(shape) for a in (attrs.axes if node.op == "relax.nn.layer_norm" else [attrs.axis])]
    if axes != [len(shape) - 1]:
        return False
    m, k = prod(shape[:-1]), shape[-1]
    threads = values.target.threads if m * k >= _PARALLEL_VALUES else 1
    arguments: list[Any] = []
    if node.op == "relax.nn.layer_norm":
        arrays = [values.graph.array(arg) for arg in node.args[1:3]]
        if any(array is None for array in arrays):
            return False
        scale, center = (array if used else np.full(k, other) for array, used, other in (
            (arrays[0], attrs.scale, 1.0), (arrays[1], attrs.center, 0.0)
        ))  # fmt: skip
        arguments = [relax.const(np.asarray(array, np.float32)) for array in (scale, center)]
        spec = RowSpec("layer_norm", m, k, float(attrs.epsilon), values.lanes, threads)
    else:
        spec = RowSpec("softmax", m, k, 0.0, values.lanes, threads)
    kernel = values.kernel(spec, lambda: rows(spec), f"{spec.op}_{m}x{k}")
    data = values.reshaped(values.as_plain(node.args[0]), (m, k))
    values.plain[node.var] = values.reshaped(
        values.call(kernel, [data, *arguments], relax.TensorType((m, k), "float32"), node), shape
    )
    return True


def _attention(values: Values, node: Node) -> bool:
    attrs = node.expr.attrs
    if attrs.causal_mask is not None or attrs.window_size is not None:
        return False
    (n, s, heads, d), (_, t, kv_heads, dv) = static_shape(node.args[0]), static_shape(node.args[2])
    if str(node.var.ty.dtype) != "float32" or dv % values.lanes or kv_heads != heads:
        return False
    scale = 1 / sqrt(d) if attrs.scale is None else float(getattr(attrs.scale, "value", attrs.scale))
    spec = AttentionSpec(n, s, t, heads, d, dv, scale, values.lanes)
    if values.target.threads > 1 and spec.macs >= _PARALLEL_MACS:
        spec = replace(spec, threads=values.target.threads)
    # Models compute q, k and v as one value and cut it: read there, nothing is copied.
    operands = list(node.args[:3])
    bases, places = zip(*(in_place(values.graph, operand) for operand in operands), strict=True)
    cut = any(base is not operand for base, operand in zip(bases, operands, strict=True))
    if cut and places[2].strides[-1] == 1:
        spec, operands = replace(spec, places=places), list(bases)
    kernel = values.kernel(spec, lambda: attention(spec, values.target), f"attention_{s}x{t}x{heads}x{d}")
    arguments = [values.as_plain(operand) for operand in operands]
    values.plain[node.var] = values.call(kernel, arguments, relax.TensorType((n, s, heads, dv), "float32"), node)
    return True
