"""Weights and per-channel arrays in the order in which the CPU kernels read them (numpy only)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .convspec import ConvSpec
from .machine import Dot

Array = NDArray[Any]


def per_channel(values: Array, blocks: int, lanes: int) -> Array:
    """Values of the channels as (blocks, lanes) float32, zero beyond the last channel."""
    out = np.zeros(blocks * lanes, np.float32)
    out[: len(values)] = values
    return out.reshape(blocks, lanes)


def weight_float(spec: ConvSpec, weight: Array) -> Array:
    """(o, c/groups, kh, kw) to (blocks, input blocks of a group, kh, kw, lanes in, lanes out) float32."""
    filled = _filled(spec, weight, np.float32)
    o, lanes = spec.out_blocks, spec.lanes
    blocked = filled.reshape(o, lanes, spec.group_blocks, spec.reduce_lanes, *spec.kernel)
    return np.ascontiguousarray(blocked.transpose(0, 2, 4, 5, 3, 1))


def weight_dot(spec: ConvSpec, weight: Array, zero_point: int) -> list[Array]:
    """(o, c/groups, kh, kw) to (blocks, input blocks, kh, kw, lanes in / depth, lanes out, depth), `spec.dot`'s.

    Weights are int8, or uint16 as `bfloat16` gives them.

    Where the data still hold their zero point a correction follows, int32 (blocks, lanes): what it adds to every sum.
    """
    assert spec.dot is not None
    depth, o, lanes = spec.dot.depth, spec.out_blocks, spec.lanes
    filled = _filled(spec, in_rows(weight, depth) if spec.in_rows else weight, weight.dtype)
    blocked = filled.reshape(o, lanes, spec.group_blocks, spec.reduce_lanes // depth, depth, *spec.taps)
    packed = np.ascontiguousarray(blocked.transpose(0, 2, 5, 6, 3, 1, 4))
    return [packed, *_correction(filled, spec.dot, zero_point, o)] if spec.corrected else [packed]


def bfloat16(values: Array) -> Array:
    """The bits of the nearest bfloat16 of every float32 that is a number, as uint16; halves to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def in_rows(weight: Array, depth: int) -> Array:
    """(o, c, kh, kw) to (o, c * depth, kh, kw / depth): so many neighbouring columns as if they were channels."""
    o, c, kh, kw = weight.shape
    steps = -(-kw // depth)
    wide = np.zeros((o, c, kh, steps * depth), weight.dtype)
    wide[..., :kw] = weight
    return wide.reshape(o, c, kh, steps, depth).transpose(0, 1, 4, 2, 3).reshape(o, c * depth, kh, steps)


def _correction(filled: Array, dot: Dot, zero_point: int, blocks: int) -> list[Array]:
    total = filled.astype(np.int32).reshape(len(filled), -1).sum(1, dtype=np.int32)
    return [(-dot.remainder(zero_point) * total).astype(np.int32).reshape(blocks, -1)]


def largest_sum(weight: Array, zero_point: int) -> int:
    """The largest magnitude that a sum of (byte - zero point) * weight can have over one output's int8 weights."""
    flat = weight.astype(np.int64).reshape(len(weight), -1)
    up, down = np.maximum(flat, 0).sum(1), np.maximum(-flat, 0).sum(1)
    high, low = 255 - zero_point, zero_point
    return int(max((up * high + down * low).max(), (up * low + down * high).max(), 1))


def largest_pair(weight: Array) -> int:
    """The largest sum of magnitudes of two weights that a step multiplies with neighbouring bytes.

    Args:
        weight: int8 (o, c/groups, ...); neighbours are the inputs 2i and 2i + 1.
    """
    sizes = np.abs(weight.astype(np.int16))
    even, odd = sizes[:, ::2], sizes[:, 1::2]
    alone = even[:, odd.shape[1] :]
    return int(max((even[:, : odd.shape[1]] + odd).max(initial=0), alone.max(initial=0)))


def weight_depthwise(weight: Array, lanes: int) -> Array:
    """(c, 1, kh, kw) to (blocks, kh, kw, lanes) float32; int8 weights become whole floats."""
    channels = weight.shape[0]
    blocks = -(-channels // lanes)
    filled = np.zeros((blocks * lanes, *weight.shape[2:]), np.float32)
    filled[:channels] = weight[:, 0]
    return np.ascontiguousarray(filled.reshape(blocks, lanes, *weight.shape[2:]).transpose(0, 2, 3, 1))


def weight_neighbours(spec: ConvSpec, weight: Array, zero_point: int) -> list[Array]:
    """(c, 1, kh, kw) int8 to (blocks, kh, kw / depth, lanes, depth), `spec.dot`'s, and `weight_dot`'s correction."""
    assert spec.dot is not None
    depth = spec.dot.depth
    near = in_rows(weight, depth)
    filled = np.zeros((spec.out_blocks * spec.lanes, *near.shape[1:]), np.int8)
    filled[: len(near)] = near
    packed = filled.reshape(spec.out_blocks, spec.lanes, *near.shape[1:]).transpose(0, 3, 4, 1, 2)
    return [np.ascontiguousarray(packed), *_correction(filled, spec.dot, zero_point, spec.out_blocks)]


def dense_float(weight: Array, lanes: int) -> Array:
    """(o, k) to (blocks, k, lanes) float32."""
    o, k = weight.shape
    blocks = -(-o // lanes)
    filled = np.zeros((blocks * lanes, k), np.float32)
    filled[:o] = weight
    return np.ascontiguousarray(filled.reshape(blocks, lanes, k).transpose(0, 2, 1))


def dense_whole(weight: Array, lanes: int, bits: int) -> Array:
    """(o, k) int8 to (blocks, k, lanes) int8; of 4 bits, within -8..7 and k = 8 j, to (blocks, j, lanes) int32.

    There a number holds the weights of eight inputs that follow each other, the first in its lowest 4 bits.
    """
    packed = dense_float(weight.astype(np.float32), lanes).astype(np.int8)
    if bits == 8:
        return packed
    found = np.zeros((len(packed), packed.shape[1] // 8, lanes), np.uint32)
    for place in range(8):
        found |= (packed[:, place::8] & 15).astype(np.uint32) << np.uint32(4 * place)
    return found.view(np.int32)


def dense_dot(weight: Array, zero_point: int, lanes: int, dot: Dot) -> list[Array]:
    """(o, k) int8 or uint16 to (blocks, k / depth, lanes, depth), and where needed the correction of `weight_dot`."""
    o, k = weight.shape
    blocks, depth = -(-o // lanes), -(-k // dot.depth) * dot.depth
    filled = np.zeros((blocks * lanes, depth), weight.dtype)
    filled[:o, :k] = weight
    packed = filled.reshape(blocks, lanes, depth // dot.depth, dot.depth).transpose(0, 2, 1, 3)
    correction = [] if dot.floats or dot.data == "int16" else _correction(filled, dot, zero_point, blocks)
    return [np.ascontiguousarray(packed), *correction]


def dense_nibbles(weight: Array, zero_point: int, lanes: int, dot: Dot) -> list[Array]:
    """(o, k) int8 within -8..7 to (blocks, k / depth / 2, lanes, depth) uint8, and the correction of `dense_dot`.

    A byte holds, each + 8, a weight of one step in its low half and of the next step in its high half.
    """
    o, k = weight.shape
    turn = 2 * dot.depth
    even = np.zeros((o, -(-k // turn) * turn), np.int8)
    even[:, :k] = weight
    packed, *correction = dense_dot(even, zero_point, lanes, dot)
    moved = (packed + 8).astype(np.uint8)
    return [np.ascontiguousarray(moved[:, ::2] | (moved[:, 1::2] << 4)), *correction]


def _filled(spec: ConvSpec, weight: Array, dtype: Any) -> Array:
    """The weights with zeros for the channels that only fill a block."""
    shape = (spec.out_blocks * spec.lanes, spec.group_blocks * spec.reduce_lanes, *spec.taps)
    filled = np.zeros(shape, dtype)
    filled[: weight.shape[0], : weight.shape[1]] = weight
    return filled
