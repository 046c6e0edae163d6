"""Weights and per-channel arrays in the order in which the CPU kernels read them (numpy only)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .convspec import ConvSpec

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


def weight_int8(spec: ConvSpec, weight: Array) -> tuple[Array, Array]:
    """(o, c/groups, kh, kw) int8 to (blocks, input blocks, kh, kw, lanes in / 4, lanes out, 4), and the correction.

    The correction, int32 (blocks, lanes), is `-zero_point * sum w`: what the data's zero point adds to every sum.
    """
    filled = _filled(spec, weight, np.int8)
    o, lanes = spec.out_blocks, spec.lanes
    correction = -spec.zero_point * filled.astype(np.int32).sum((1, 2, 3), dtype=np.int32)
    blocked = filled.reshape(o, lanes, spec.group_blocks, spec.reduce_lanes // 4, 4, *spec.kernel)
    packed = np.ascontiguousarray(blocked.transpose(0, 2, 5, 6, 3, 1, 4))
    return packed, correction.astype(np.int32).reshape(o, lanes)


def weight_depthwise(weight: Array, lanes: int) -> Array:
    """(c, 1, kh, kw) to (blocks, kh, kw, lanes) float32; int8 weights become whole floats."""
    channels = weight.shape[0]
    blocks = -(-channels // lanes)
    filled = np.zeros((blocks * lanes, *weight.shape[2:]), np.float32)
    filled[:channels] = weight[:, 0]
    return np.ascontiguousarray(filled.reshape(blocks, lanes, *weight.shape[2:]).transpose(0, 2, 3, 1))


def dense_float(weight: Array, lanes: int) -> Array:
    """(o, k) to (blocks, k, lanes) float32."""
    o, k = weight.shape
    blocks = -(-o // lanes)
    filled = np.zeros((blocks * lanes, k), np.float32)
    filled[:o] = weight
    return np.ascontiguousarray(filled.reshape(blocks, lanes, k).transpose(0, 2, 1))


def dense_int8(weight: Array, zero_point: int, lanes: int) -> list[Array]:
    """(o, k) int8 to (blocks, k / 4, lanes, 4), and the correction as in `weight_int8`."""
    o, k = weight.shape
    blocks, depth = -(-o // lanes), -(-k // 4) * 4
    filled = np.zeros((blocks * lanes, depth), np.int8)
    filled[:o, :k] = weight
    correction = (-zero_point * filled.astype(np.int32).sum(1)).astype(np.int32).reshape(blocks, lanes)
    return [np.ascontiguousarray(filled.reshape(blocks, lanes, depth // 4, 4).transpose(0, 2, 1, 3)), correction]


def _filled(spec: ConvSpec, weight: Array, dtype: Any) -> Array:
    """The weights with zeros for the channels that only fill a block."""
    shape = (spec.out_blocks * spec.lanes, spec.group_blocks * spec.reduce_lanes, *spec.kernel)
    filled = np.zeros(shape, dtype)
    filled[: weight.shape[0], : weight.shape[1]] = weight
    return filled
