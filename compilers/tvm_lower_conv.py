"""Convolutions with what follows them to calls of our kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import relax

from .cpu.convspec import ConvSpec, Step
from .cpu.epilogue import quantize_numbers
from .cpu.kernels import conv_kernel, conv_weights
from .cpu.packing import in_rows, largest_pair, largest_sum, per_channel
from .cpu.tiles import Choice, WinogradTile, chosen, plain_form, plain_lanes
from .tvm_affine import divided_by_scale, leading_affine, within_bytes
from .tvm_graph import Array, Chain, ChainStep, static_shape
from .tvm_numbers import frame, pair
from .tvm_values import Values


def lower_convolution(values: Values, chain: Chain) -> None:
    """Emits the call of the kernel that computes a chain which begins with a convolution; its result is blocked."""
    head = chain.head
    halves = head.mark is not None and head.mark.bfloat16
    int8 = head.op == "qconv2d" and not halves
    source, quantize = values.quantized_source(head.args[0]) if int8 or halves else (head.args[0], False)
    n, c, h, w = static_shape(source)
    steps = list(chain.steps)
    if int8 or halves:
        attributes = head.mark.attributes  # type: ignore[union-attr]
        weight, groups, zero_point = attributes["weight"], attributes["groups"], attributes.get("zero_point", 0)
        stride, dilation = attributes["stride"], attributes["dilation"]
        top, left = attributes["padding"]
        padding = (top, left, top, left)
        own = [name for name in ("scale", "bias") if name in attributes]
        steps = [*(ChainStep(Step(name), array=attributes[name].astype(np.float64)) for name in own), *steps]
    else:
        weight, groups, zero_point = values.graph.array(head.args[1]), int(head.expr.attrs.groups), 0
        stride, dilation = pair(head.expr.attrs.strides), pair(head.expr.attrs.dilation)
        padding = frame(head.expr.attrs.padding)
    assert weight is not None
    if head.index in values.graph.framing:
        top, left, bottom, right = (a + b for a, b in zip(padding, values.graph.framing[head.index], strict=True))
        padding = (top, left, bottom, right)
    o = weight.shape[0]
    depthwise = groups == c == o and groups > 1 and not halves
    if not depthwise and groups > 1:
        weight, groups = _merge_groups(weight, groups, c, values.lanes)
    affine, rest = leading_affine(steps, o)
    affine, rest = divided_by_scale(affine, within_bytes(rest))
    if not (int8 or halves):
        weight = weight * affine[0].reshape(-1, 1, 1, 1)
    plain = not depthwise and c < values.lanes and source not in values.blocked
    dot, in_lanes = None, 1 if plain else values.lanes
    if int8 and plain:
        columns = largest_pair(in_rows(weight, 2)) if dilation[1] == 1 else 0
        dot, in_lanes = plain_form(c, weight.shape[2:], dilation, values.target, largest_pair(weight), columns)
    elif halves:
        dot = values.target.halves
        in_lanes = plain_lanes(c, weight.shape[2:], dilation, dot, values.target) if plain else in_lanes
    elif int8:
        dot = values.target.dot if depthwise else values.target.dot_for(largest_pair(weight))
    plain = in_lanes != values.lanes
    # The factor of float32 is in its weights.
    arrays = [("scale", affine[0])] if int8 or (halves and (affine[0] != 1).any()) else []
    arrays += [("bias", affine[1])] if int8 or affine[1].any() else []
    spec = ConvSpec(
        n=n, c=c, h=h, w=w, o=o, kernel=(weight.shape[2], weight.shape[3]), stride=stride, padding=padding,
        dilation=dilation, groups=1 if depthwise else groups, lanes=values.lanes, in_lanes=in_lanes,
        depthwise=depthwise, dot=dot, quantize=quantize,
        steps=(*(Step(name) for name, _ in arrays), *(step.step for step in rest)),
        threads=1,
    )  # fmt: skip
    data = values.as_plain(source) if plain else values.as_blocked(source)
    if depthwise and quantize and not spec.neighbours:  # every byte is read once for each tap: quantise it once
        data, spec = values.quantized(data, *values.quantizer(head.args[0])), replace(spec, quantize=False)
    bound = largest_sum(weight, zero_point) if int8 else 0
    spec, choice = chosen(spec, values.target, values.graph.weight_count, bound)
    values.convolutions[spec] = choice, bound
    if int8 and isinstance(choice, WinogradTile):  # it multiplies words, and is one kernel whatever the weights are
        spec = replace(spec, dot=values.target.dot)
    arguments = [data]
    if int8:
        # 1 / scale counts only where this kernel quantises.
        scale = values.quantizer(head.args[0])[0] if spec.quantize else 1.0
        arguments.append(relax.const(quantize_numbers(scale, zero_point)))
    packed = conv_weights(spec, choice, values.target, weight, zero_point)
    arguments += [relax.const(array) for array in packed]
    arguments += [relax.const(per_channel(array, spec.out_blocks, values.lanes)) for _, array in arrays]
    arguments += values.step_arguments(rest, spec.out_blocks)
    kernel = values.kernel((spec, choice), lambda: conv_kernel(spec, choice, values.target), conv_name(spec, choice))
    out = relax.TensorType((n, spec.out_blocks, spec.oh, spec.ow, values.lanes), spec.out_dtype)
    values.blocked[chain.last.var] = values.call(kernel, arguments, out, head)


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


def conv_name(spec: ConvSpec, choice: Choice) -> str:
    """What the symbol of a convolution's kernel begins with."""
    plain = "winograd" if isinstance(choice, WinogradTile) else "depthwise" if spec.depthwise else "conv"
    kind = ("q" if spec.int8 else "b" if spec.dot else "") + plain
    kernel = "x".join(str(k) for k in spec.kernel)
    tail = "_".join(step.op for step in spec.steps if step.op not in ("scale", "bias"))
    name = f"{kind}{kernel}_{spec.c}x{spec.h}x{spec.w}_{spec.o}_s{spec.stride[0]}"
    return f"{name}_{tail}" if tail else name
