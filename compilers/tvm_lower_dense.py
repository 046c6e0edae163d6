"""Dense layers with what follows them to calls of our kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import relax

from ..spaces.bit_widths import LEVELS
from .cpu.convspec import Step
from .cpu.dense import DenseSpec, dense, nibbles_pay
from .cpu.epilogue import quantize_numbers
from .cpu.packing import dense_dot, dense_float, dense_nibbles, dense_whole, largest_pair, per_channel
from .cpu.tiles import PARALLEL_MACS
from .tvm_affine import leading_affine, within_bytes
from .tvm_graph import Chain, ChainStep, static_shape
from .tvm_values import Values


def lower_dense(values: Values, chain: Chain) -> None:
    """Emits the call of the kernel that computes a chain which begins with a dense layer; its result is plain."""
    head = chain.head
    halves = head.mark is not None and head.mark.bfloat16
    int8 = head.op == "qlinear" and not halves
    whole = int8 or head.op == "wlinear"
    source, quantize = values.quantized_source(head.args[0]) if int8 or halves else (head.args[0], False)
    shape = static_shape(source)
    steps = list(chain.steps)
    zero_point = 0
    if whole or halves:
        attributes = head.mark.attributes  # type: ignore[union-attr]
        weight, zero_point = attributes["weight"], attributes.get("zero_point", 0)
        own = [name for name in ("scale", "bias") if name in attributes]
        steps = [*(ChainStep(Step(name), array=attributes[name].astype(np.float64)) for name in own), *steps]
    else:
        matrix = values.graph.array(head.args[1])
        assert matrix is not None
        weight = matrix.T
    o, k = weight.shape
    affine, rest = leading_affine(steps, o)
    rest = within_bytes(rest)
    if not (whole or halves):
        weight = weight * affine[0].reshape(-1, 1)
    # The factor of float32 is in its weights.
    arrays = [("scale", affine[0])] if whole or (halves and (affine[0] != 1).any()) else []
    arrays.append(("bias", affine[1]))
    m, dot = int(np.prod(shape[:-1])), values.target.halves if halves else None
    if int8:
        dot = values.target.dot_for(largest_pair(weight))
    spec = DenseSpec(
        m=m, k=k, o=o, lanes=values.lanes, dot=dot, quantize=quantize,
        steps=(*(Step(name) for name, _ in arrays), *(step.step for step in rest)),
        threads=values.target.threads if m * k * o >= PARALLEL_MACS else 1,
    )  # fmt: skip
    largest = int(np.abs(weight.astype(np.int16)).max(initial=0)) if whole else 0
    if whole and not int8:
        spec = replace(spec, weight_bits=4 if largest <= LEVELS[4] and k % 8 == 0 else 8)
    if int8 and nibbles_pay(spec, largest, values.target):
        spec = replace(spec, nibbles=True)
    if dot:
        packed = (dense_nibbles if spec.nibbles else dense_dot)(weight, zero_point, values.lanes, dot)
    elif whole:
        packed = [dense_whole(weight, values.lanes, spec.weight_bits)]
    else:
        packed = [dense_float(weight, values.lanes)]
    arguments = [values.reshaped(values.as_plain(source), (m, k))]
    if int8:
        scale = values.quantizer(head.args[0])[0] if quantize else 1.0
        arguments.append(relax.const(quantize_numbers(scale, zero_point)))
    arguments += [relax.const(array) for array in packed]
    arguments += [relax.const(per_channel(array, spec.out_blocks, values.lanes)) for _, array in arrays]
    for step in rest:
        if step.step.op == "quantize":
            arguments.append(relax.const(step.array))
        elif step.array is not None:
            arguments.append(relax.const(per_channel(step.array, spec.out_blocks, values.lanes)))
        elif step.operand is not None:
            arguments.append(values.reshaped(values.as_plain(step.operand), (m, o)))
    name = f"{'q' if int8 else 'b' if halves else 'w' if whole else ''}dense_{m}x{k}_{o}"
    kernel = values.kernel(spec, lambda: dense(spec, values.target), name)
    value = values.call(kernel, arguments, relax.TensorType((m, o), spec.out_dtype), head)
    values.plain[chain.last.var] = values.reshaped(value, (*shape[:-1], o))
