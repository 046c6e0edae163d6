"""Pooling to calls of our kernels."""

from __future__ import annotations

from math import ceil

from tvm import relax

from .cpu.pool import MeanSpec, PoolSpec, global_mean, pool
from .tvm_graph import Node, static_shape
from .tvm_numbers import frame, pair
from .tvm_values import Values

# From here on a second thread gains more than it costs to wake it.
_PARALLEL_VALUES = 100_000


def lower_pooling(values: Values, node: Node) -> bool:
    """Emits the call of the kernel that computes a node; False where it is no pooling that a kernel computes."""
    if node.op == "relax.mean" and len(static_shape(node.args[0])) == 4:
        axes = sorted(int(a) % 4 for a in node.expr.attrs.axis or ())
        if axes != [2, 3] or node.args[0] not in values.blocked:
            return False
        n, c, h, w = static_shape(node.args[0])
        threads = values.target.threads if n * c * h * w > _PARALLEL_VALUES else 1
        mean = MeanSpec(n, c, h, w, values.lanes, threads)
        kernel = values.kernel(mean, lambda: global_mean(mean), f"mean_{c}x{h}x{w}")
        value = values.call(kernel, [values.blocked[node.args[0]]], relax.TensorType((n, c), "float32"), node)
        keep = bool(node.expr.attrs.keepdims)
        values.plain[node.var] = values.builder.emit(relax.op.reshape(value, (n, c, 1, 1))) if keep else value
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
        kernel_size, stride = pair(attrs.pool_size), pair(attrs.strides)
        padding = frame(attrs.padding)
        # A window that ceil_mode hangs over the edge counts neither way in torch: leave that to the fallback.
        include = bool(attrs.count_include_pad)
        if node.op == "relax.nn.avg_pool2d" and bool(attrs.ceil_mode):
            return False
    spec = PoolSpec(
        n, ceil(c / values.lanes), h, w, kernel_size, stride, padding, (out[0], out[1]),
        node.op == "relax.nn.max_pool2d", include, values.lanes,
        values.target.threads if n * c * h * w > _PARALLEL_VALUES else 1,
    )  # fmt: skip
    kernel = values.kernel(spec, lambda: pool(spec), f"pool_{spec.blocks * values.lanes}x{h}x{w}")
    shape = relax.TensorType((n, spec.blocks, *out, values.lanes), "float32")
    values.blocked[node.var] = values.call(kernel, [values.as_blocked(node.args[0])], shape, node)
    return True
