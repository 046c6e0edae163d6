"""Zeros around an image that a convolution reads: its kernel frames its own input, and nothing is copied before."""

from __future__ import annotations

from typing import Any

from .tvm_graph import Graph, Node, is_head, same
from .tvm_numbers import frame, pair

Frame = tuple[int, int, int, int]  # top, left, bottom, right


def fold_padding(graph: Graph) -> None:
    """Takes paddings with zeros out of a graph that convolutions alone read; `graph.framing` has them then.

    Bytes may be between: what quantises to a zero point counts as zero, as the convolution's own padding does. A
    padding of which a whole window would lie outside the image stays.
    """
    for pad in [node for node in reversed(graph.nodes) if node.op == "relax.nn.pad"]:
        added = _zeros(pad)
        readers = None if same(pad.var, graph.output) else _readers(graph, pad)
        if added is None or not readers:
            continue
        whole = {node.index: _sum(graph.framing.get(node.index, (0, 0, 0, 0)), added) for node in readers}
        if all(_reaches(graph, node, whole[node.index]) for node in readers):
            graph.bypass(pad)
            graph.framing.update(whole)


def _zeros(pad: Node) -> Frame | None:
    """How many zeros are added to an (n, c, h, w) value on its four sides; None where it is something else."""
    attributes: Any = pad.expr.attrs
    widths = [int(width) for width in attributes.pad_width]
    if str(attributes.pad_mode) != "constant" or float(attributes.pad_value) != 0:
        return None
    if len(widths) != 8 or any(widths[:4]) or min(widths) < 0:
        return None
    top, bottom, left, right = widths[4:]
    return top, left, bottom, right


def _readers(graph: Graph, pad: Node) -> list[Node] | None:
    """The convolutions that read a padded value, bytes of it or the floats; None where anything else reads it."""
    found = []
    for user in graph.users[pad.var]:
        if user.op == "quantize" and not same(user.var, graph.output):
            through, kind = user.var, "qconv2d"
            users = graph.users[user.var]
        else:
            through, kind = pad.var, "relax.nn.conv2d"
            users = [user]
        for node in users:
            if node.op != kind or not is_head(graph, node) or not same(node.args[0], through):
                return None
            found.append(node)
    return found


def _reaches(graph: Graph, node: Node, added: Frame) -> bool:
    """Whether every window of the convolution, framed so much further, has a pixel of the image."""
    if node.mark is not None:
        attributes = node.mark.attributes
        weight, dilation, (top, left) = attributes["weight"], attributes["dilation"], attributes["padding"]
        own = (top, left, top, left)
    else:
        weight, dilation = graph.array(node.args[1]), pair(node.expr.attrs.dilation)
        own = frame(node.expr.attrs.padding)
    assert weight is not None
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    top, left, bottom, right = _sum(own, added)
    return bool(max(top, bottom) <= reach[0] and max(left, right) <= reach[1])


def _sum(one: Frame, other: Frame) -> Frame:
    top, left, bottom, right = (a + b for a, b in zip(one, other, strict=True))
    return top, left, bottom, right
